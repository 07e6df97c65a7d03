// Checks tensors, and turns them into what the launchers take. Compiled for a GPU, or, with LONGVQ_ON_HOST, for tests
// that run the same kernels on the CPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "../common/check_tensor.h"
#include "../common/tensor_dtype.h"
#include "common/sequences.h"

namespace longvq::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Makes the device of a tensor the current device while this object lives, and holds the current stream of that device.
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

// ---- checks ----

// Raises "{op}: {name} must be {expected}, got {the sizes, dtype and device of x}" unless `valid`.
void check(const char* op, const char* name, const Tensor& x, bool valid, const char* expected);

// Accepts absent masks.
void check_mask(const char* op, const OptionalTensor& key_padding_mask, int64_t batch, int64_t length);

void check_same_device(const char* op, const Tensor& x, std::initializer_list<OptionalTensor> others);

// Raises if a launcher returned an error.
void check_launch(const char* op, int error);

ElementType checked_type(const char* op, const char* name, const Tensor& x);

// ---- conversions ----

// A tensor whose last axis is contiguous; copies if it is not.
inline Tensor with_dense_rows(const Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) <= 1 ? x : torch::stable::contiguous(x);
}

inline Tensor as_type(const Tensor& x, ScalarType type) {
  return x.scalar_type() == type ? x : torch::stable::to(x, type);
}

inline Tensor new_zeros(const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType type) {
  Tensor zeros = torch::stable::new_empty(x, sizes, type);
  torch::stable::zero_(zeros);
  return zeros;
}

// The strides of the first three axes, as a struct of three numbers that a launcher takes.
template <typename Struct>
Struct strides_of(const Tensor& x) {
  return {x.stride(0), x.stride(1), x.stride(2)};
}

template <typename T>
T* data_of(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <typename T>
const T* const_data_of(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

// The rows of a batch, or the documents of cu_seqlens (N + 1,). The values of cu_seqlens are not checked, because that
// would wait for the device. `offsets` keeps the tensor that the result points to.
Sequences sequences_of(
    const char* op, int64_t batch, int64_t length, const OptionalTensor& cu_seqlens, OptionalTensor& offsets);

PaddingMask padding_mask(const OptionalTensor& key_padding_mask);

}  // namespace longvq::cuda
