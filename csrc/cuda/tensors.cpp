#include "tensors.h"

#ifndef LONGVQ_ON_HOST
#include <dlfcn.h>
#endif

namespace longvq::cuda {

#ifdef LONGVQ_ON_HOST

OnDeviceOf::OnDeviceOf(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu(), op, ": expected tensors on the CPU");
}

#else

namespace {

// Of libtorch_cuda, which is there whenever there are CUDA tensors, but which this library must not need to be loaded.
// Python loads it for itself alone, so that it has to be asked for by name.
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
      function != nullptr && function(device, &stream) == 0, "longvq_layers: this torch doesn't tell its CUDA stream");
  return stream;
}

}  // namespace

OnDeviceOf::OnDeviceOf(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cuda(), op, ": expected tensors on a CUDA device");
  const int32_t device = x.get_device_index();
  guard_.emplace(device);
  stream_ = current_stream(device);
}

#endif

void check_devices(const char* op, const Tensor& x, std::initializer_list<OptionalTensor> others) {
  for (const OptionalTensor& other : others) {
    STD_TORCH_CHECK(
        !other.has_value() || (other->is_cuda() == x.is_cuda() && other->get_device_index() == x.get_device_index()),
        op, ": all tensors must be on one device");
  }
}

void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error != kNotCovered, op, ": no CUDA kernel for these sizes");
  STD_TORCH_CHECK(error == 0, op, ": ", longvq_cuda_error_text(error));
}

Sequences sequences_of(
    const char* op, int64_t batch, int64_t length, const OptionalTensor& cu_seqlens, OptionalTensor& offsets) {
  if (!cu_seqlens.has_value()) {
    return {batch, length, nullptr, 0};
  }
  STD_TORCH_CHECK(
      cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1 && cu_seqlens->scalar_type() == ScalarType::Int, op,
      ": cu_seqlens must be (N + 1,), int32");
  STD_TORCH_CHECK(batch == 1, op, ": with cu_seqlens all documents lie in one row, got a batch of ", batch);
  const int64_t documents = cu_seqlens->size(0) - 1;
  STD_TORCH_CHECK(documents > 0 || length == 0, op, ": cu_seqlens has no document for the ", length, " positions");
  offsets = torch::stable::contiguous(*cu_seqlens);
  return {batch, length, const_data_of<int32_t>(*offsets), documents};
}

PackedCodebook::PackedCodebook(
    const char* op, const Tensor& from, ElementType type, int64_t first, int64_t columns, void* stream) {
  const Tensor values = as_type(from, ScalarType::Float);
  const int64_t heads = values.size(0), codes = values.size(1), padded = padded_codes(codes);
  const int64_t count = type == ElementType::kFloat ? 3 : 1;
  parts = torch::stable::new_empty(values, {heads, count, padded, columns}, ScalarType::BFloat16);
  half_norms = torch::stable::new_empty(values, {heads, padded}, ScalarType::Float);
  codebook = {heads, codes, values.size(2) - first, columns, data_of<uint16_t>(parts), data_of<float>(half_norms)};
  const PackCodebook problem{
      static_cast<const float*>(values.const_data_ptr()) + first * values.stride(2),
      values.stride(0),
      values.stride(1),
      values.stride(2),
      type,
      codebook};
  if (heads > 0) {
    check_launch(op, longvq_cuda_pack_codebook(&problem, stream));
  }
}

FarFieldTensors::FarFieldTensors(FarField& p, const Tensor& like) {
  const auto empty = [&](std::initializer_list<int64_t> sizes, ScalarType type) {
    return torch::stable::new_empty(like, sizes, type);
  };
  const int64_t fields = p.far_fields(), padded = padded_codes(p.codes);
  const int64_t kept = p.causal || p.all_far() ? 0 : fields;
  segment_sums = empty({p.batch, p.heads, p.segments(), p.codes, p.values}, ScalarType::Float);
  segment_numbers = empty({p.batch, p.heads, p.segments(), p.codes}, ScalarType::Int);
  before_sums = empty({p.batch, p.heads, kept, p.codes, p.values}, ScalarType::Float);
  before_numbers = empty({p.batch, p.heads, kept, p.codes}, ScalarType::Int);
  means = empty({p.batch, p.heads, fields, padded, value_pitch(p.values)}, like.scalar_type());
  numbers = empty({p.batch, p.heads, fields, padded}, ScalarType::Float);
  p.segment_sums = data_of<float>(segment_sums), p.segment_numbers = data_of<int32_t>(segment_numbers);
  p.before_sums = data_of<float>(before_sums), p.before_numbers = data_of<int32_t>(before_numbers);
  p.means = means.mutable_data_ptr(), p.numbers = data_of<float>(numbers);
}

}  // namespace longvq::cuda
