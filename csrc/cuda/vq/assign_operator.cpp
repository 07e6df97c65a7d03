#include "../operators.h"

namespace longvq::cuda {

Tensor vq_assign(const Tensor& k, const Tensor& codebook) {
  constexpr const char* kOp = "vq_assign";
  STD_TORCH_CHECK(
      k.dim() == 4 && codebook.dim() == 3 && codebook.size(0) == k.size(1) && codebook.size(2) == k.size(3) &&
          codebook.size(1) >= 1,
      kOp, ": expected k (B, H, L, D) and codebook (H, S, D) with S >= 1");
  check_devices(kOp, k, {codebook});
  const ElementType type = type_of(kOp, k);
  const OnDeviceOf device(kOp, k);
  Tensor codes = torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2)}, ScalarType::Long);
  const Tensor keys = with_dense_rows(k);
  const PackedCodebook packed(kOp, codebook, ElementType::kFloat, 0, padded_depth(k.size(3)), device.stream());
  const Assign problem{keys.const_data_ptr(), type,           keys.size(0),    keys.size(2),           keys.stride(0),
                       keys.stride(1),        keys.stride(2), packed.codebook, data_of<int64_t>(codes)};
  check_launch(kOp, longvq_cuda_assign(&problem, device.stream()));
  return codes;
}

}  // namespace longvq::cuda
