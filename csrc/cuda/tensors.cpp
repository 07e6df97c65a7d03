#include "tensors.h"

#include "common/status.h"

#ifndef LONGVQ_ON_HOST
#include <dlfcn.h>
#endif

namespace longvq::cuda {

#ifdef LONGVQ_ON_HOST

OnDeviceOf::OnDeviceOf(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu(), op, ": tensors must be on the CPU");
}

#else

namespace {

// A function of libtorch_cuda. libtorch_cuda is loaded whenever CUDA tensors exist, but this library must also load
// without it. Python doesn't make the symbols of libtorch_cuda global, so the function is looked up by name.
using StreamOfDevice = int32_t (*)(int32_t, void**);
StreamOfDevice find_stream_of_device() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<StreamOfDevice>(
      dlsym(library != nullptr ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
}

void* current_stream(int32_t device) {
  static const StreamOfDevice function = find_stream_of_device();
  void* stream = nullptr;
  STD_TORCH_CHECK(
      function != nullptr && function(device, &stream) == 0,
      "longvq_layers: this torch offers no aoti_torch_get_current_cuda_stream");
  return stream;
}

}  // namespace

OnDeviceOf::OnDeviceOf(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cuda(), op, ": tensors must be on a CUDA device, got the CPU");
  const int32_t device = x.get_device_index();
  guard_.emplace(device);
  stream_ = current_stream(device);
}

#endif

void check(const char* op, const char* name, const Tensor& x, bool valid, const char* expected) {
  STD_TORCH_CHECK(valid, op, ": ", name, " must be ", expected, ", got ", tensor_text(x));
}

void check_mask(const char* op, const OptionalTensor& mask, int64_t batch, int64_t length) {
  if (mask.has_value()) {
    const bool valid = has_sizes(*mask, {batch, length}) && mask->scalar_type() == ScalarType::Bool;
    check(op, "key_padding_mask", *mask, valid, "(B, L) bool");
  }
}

void check_same_device(const char* op, const Tensor& x, std::initializer_list<OptionalTensor> others) {
  for (const OptionalTensor& other : others) {
    STD_TORCH_CHECK(
        !other.has_value() || (other->is_cuda() == x.is_cuda() && other->get_device_index() == x.get_device_index()),
        op, ": all tensors must be on one device, got several");
  }
}

void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error != kUnsupported, op, ": there is no CUDA kernel for these sizes");
  STD_TORCH_CHECK(error == 0, op, ": ", longvq_cuda_error_text(error));
}

ElementType checked_type(const char* op, const char* name, const Tensor& x) {
  const std::optional<ElementType> type = element_type(x);
  check(op, name, x, type.has_value(), "float32, bfloat16 or float16 for the CUDA kernels");
  return *type;
}

Sequences sequences_of(
    const char* op, int64_t batch, int64_t length, const OptionalTensor& cu_seqlens, OptionalTensor& offsets) {
  if (!cu_seqlens.has_value()) {
    return {batch, length, nullptr, 0};
  }
  const bool valid = has_sizes(*cu_seqlens, {kAnySize}) && cu_seqlens->size(0) >= 1;
  check(op, "cu_seqlens", *cu_seqlens, valid && cu_seqlens->scalar_type() == ScalarType::Int, "(N + 1,) int32");
  STD_TORCH_CHECK(batch == 1, op, ": the batch must be 1 with cu_seqlens, got ", batch);
  const int64_t documents = cu_seqlens->size(0) - 1;
  STD_TORCH_CHECK(
      documents > 0 || length == 0, op, ": cu_seqlens must hold a document for the ", length, " positions, got none");
  offsets = torch::stable::contiguous(*cu_seqlens);
  return {batch, length, const_data_of<int32_t>(*offsets), documents};
}

PaddingMask padding_mask(const OptionalTensor& mask) {
  if (!mask.has_value()) {
    return {nullptr, 0, 0};
  }
  return {static_cast<const uint8_t*>(mask->const_data_ptr()), mask->stride(0), mask->stride(1)};
}

}  // namespace longvq::cuda
