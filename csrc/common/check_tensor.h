// Checks of tensors. Their error messages say what was expected and what was given. For files that are compiled once.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <string>

namespace longvq {

constexpr int64_t kAnySize = -1;

inline const char* dtype_name(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

// Returns, for example, "(2, 5, any)".
inline std::string sizes_text(std::initializer_list<int64_t> sizes) {
  std::string text = "(";
  for (const int64_t size : sizes) {
    text += (text.size() > 1 ? ", " : "") + (size == kAnySize ? std::string("any") : std::to_string(size));
  }
  return text + ")";
}

// Returns, for example, "(2, 5, 8) float32 on the CPU".
inline std::string tensor_text(const torch::stable::Tensor& x) {
  std::string text = "(";
  for (int64_t axis = 0; axis < x.dim(); ++axis) {
    text += (axis > 0 ? ", " : "") + std::to_string(x.size(axis));
  }
  return text + ") " + dtype_name(x.scalar_type()) + (x.is_cpu() ? " on the CPU" : " on another device");
}

inline bool has_sizes(const torch::stable::Tensor& x, std::initializer_list<int64_t> sizes) {
  int64_t axis = 0;
  bool same = x.dim() == static_cast<int64_t>(sizes.size());
  for (auto size = sizes.begin(); same && size != sizes.end(); ++size, ++axis) {
    same = *size == kAnySize || x.size(axis) == *size;
  }
  return same;
}

// `axes` names the axes, for example "(B, H, L, D)".
inline void check_tensor(
    const char* op, const char* name, const torch::stable::Tensor& x, torch::headeronly::ScalarType type,
    const char* axes, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(
      x.is_cpu() && x.scalar_type() == type && has_sizes(x, sizes), op, ": ", name, " must be ", axes, " = ",
      sizes_text(sizes), " ", dtype_name(type), " on the CPU, got ", tensor_text(x));
}

}  // namespace longvq
