#include "../common/status.h"
#include "../operators.h"
#include "packed_codebook.h"

namespace longvq::cuda {

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
  const Assign problem{
      keys.const_data_ptr(),  type, keys.size(0), keys.size(2), strides_of<Strides>(keys), packed.codebook,
      data_of<int64_t>(codes)};
  check_launch(kOp, longvq_cuda_assign(&problem, device.stream()));
  return codes;
}

}  // namespace longvq::cuda
