// Tensors as the launchers of launch.h take them. Compiled for a GPU, or, with LONGVQ_ON_HOST, for tests that run the
// same kernels on the CPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "../common/tensor_dtype.h"
#include "launch.h"

namespace longvq::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The device of a tensor and its current stream, for as long as this lives.
class OnDeviceOf {
 public:
  OnDeviceOf(const char* op, const Tensor& x);

  void* stream() const { return stream_; }

 private:
#ifndef LONGVQ_ON_HOST
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
  void* stream_ = nullptr;
};

// Raises unless all are where `x` is.
void check_devices(const char* op, const Tensor& x, std::initializer_list<OptionalTensor> others);

// Raises where a launcher returned an error.
void check_launch(const char* op, int error);

// A tensor whose last axis lies without gaps in memory; a copy if it has to be.
inline Tensor with_dense_rows(const Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) <= 1 ? x : torch::stable::contiguous(x);
}

inline Tensor as_type(const Tensor& x, ScalarType type) {
  return x.scalar_type() == type ? x : torch::stable::to(x, type);
}

inline ElementType type_of(const char* op, const Tensor& x) {
  const std::optional<ElementType> type = element_type(x);
  STD_TORCH_CHECK(type.has_value(), op, ": the compiled CUDA kernels take float32, bfloat16 or float16");
  return *type;
}

template <typename T>
T* data_of(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <typename T>
const T* const_data_of(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

// Rows, or the documents of cu_seqlens (N + 1,), whose values are not looked at: that would wait for the device.
// `offsets` keeps what the result points to.
Sequences sequences_of(
    const char* op, int64_t batch, int64_t length, const OptionalTensor& cu_seqlens, OptionalTensor& offsets);

// A codebook (H, S, D) packed as tensor cores take it, from column `first` on, padded to `columns`.
struct PackedCodebook {
  Tensor parts, half_norms;
  Codebook codebook;

  PackedCodebook(
      const char* op, const Tensor& codebook, ElementType type, int64_t first, int64_t columns, void* stream);
};

// What the far fields of a problem are made in; sets the pointers of the problem.
struct FarFieldTensors {
  Tensor segment_sums, segment_numbers, before_sums, before_numbers, means, numbers;

  FarFieldTensors(FarField& problem, const Tensor& like);
};

}  // namespace longvq::cuda
