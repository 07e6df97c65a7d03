#include "../common/status.h"
#include "../operators.h"
#include "packed_codebook.h"

namespace longvq::cuda {

PackedCodebook::PackedCodebook(const char* op, const Tensor& from, ElementType type, int64_t columns, void* stream) {
  const Tensor values = as_type(from, ScalarType::Float);
  const int64_t heads = values.size(0), num_codes = values.size(1), padded = padded_codes(num_codes);
  const int64_t num_terms = type == ElementType::kFloat ? 3 : 1;
  terms = torch::stable::new_empty(values, {heads, num_terms, padded, columns}, ScalarType::BFloat16);
  half_norms = torch::stable::new_empty(values, {heads, padded}, ScalarType::Float);
  codebook = {heads, num_codes, values.size(2), columns, data_of<uint16_t>(terms), data_of<float>(half_norms)};
  const PackCodebook problem{
      const_data_of<float>(values), values.stride(0), values.stride(1), values.stride(2), type, codebook};
  if (heads > 0) {
    check_launch(op, longvq_cuda_pack_codebook(&problem, stream));
  }
}

Tensor vq_assign(const Tensor& k, const Tensor& codebook) {
  constexpr const char* kOp = "vq_assign";
  check(kOp, "k", k, k.dim() == 4, "(B, H, L, D)");
  const bool valid = has_sizes(codebook, {k.size(1), kAnySize, k.size(3)}) && codebook.size(1) >= 1;
  check(kOp, "codebook", codebook, valid, "(H, S, D) with S >= 1 and the H and D of k");
  check_same_device(kOp, k, {codebook});
  const ElementType type = checked_type(kOp, "k", k);
  const OnDeviceOf device(kOp, k);
  Tensor codes = torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2)}, ScalarType::Long);
  const Tensor keys = with_dense_rows(k);
  const PackedCodebook packed(kOp, codebook, ElementType::kFloat, padded_head_dim(k.size(3)), device.stream());
  const Assign problem{keys.const_data_ptr(),  type, keys.size(0), keys.size(2), strides_of(keys), packed.codebook,
                       data_of<int64_t>(codes)};
  check_launch(kOp, longvq_cuda_assign(&problem, device.stream()));
  return codes;
}

}  // namespace longvq::cuda
