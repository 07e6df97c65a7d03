#include <algorithm>

#include "operators.h"

namespace longvq::cuda {
namespace {

constexpr const char* kOp = "vq_attention";

void check_sizes(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& codebook, const Tensor& codes,
    const OptionalTensor& bias, const OptionalTensor& mask, bool causal, int64_t window, int64_t near_dim) {
  STD_TORCH_CHECK(
      q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && codebook.dim() == 3 && codes.dim() == 3, kOp,
      ": expected q (B, H, L, D), k (B, Hkv, L, D), v (B, Hkv, L, E), codebook (Hkv, S, D) and codes (B, Hkv, L)");
  const int64_t batch = q.size(0), heads = q.size(1), length = q.size(2), depth = q.size(3), kv_heads = k.size(1);
  STD_TORCH_CHECK(
      k.size(0) == batch && k.size(2) == length && k.size(3) == depth && v.size(0) == batch &&
          v.size(1) == kv_heads && v.size(2) == length && codebook.size(0) == kv_heads && codebook.size(1) >= 1 &&
          codebook.size(2) == depth && codes.size(0) == batch && codes.size(1) == kv_heads &&
          codes.size(2) == length && kv_heads > 0 && heads % kv_heads == 0,
      kOp, ": q, k, v, codebook and codes don't belong together");
  STD_TORCH_CHECK(
      q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), kOp,
      ": q, k and v must have one type");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Long, kOp, ": codes must be int64");
  STD_TORCH_CHECK(window >= 0 && near_dim >= 0 && near_dim <= depth, kOp, ": window and near_dim out of range");
  STD_TORCH_CHECK(
      !bias.has_value() || (bias->dim() == 2 && bias->size(0) == heads &&
                            bias->size(1) == (causal ? window : 2 * window - 1)),
      kOp, ": bias must be (H, W), bidirectional (H, 2 W - 1)");
  STD_TORCH_CHECK(
      !mask.has_value() || (mask->dim() == 2 && mask->size(0) == batch && mask->size(1) == length &&
                            mask->scalar_type() == ScalarType::Bool),
      kOp, ": key_padding_mask must be (B, L), bool");
}

// One over the number of keys that each query may attend, (B, L).
Tensor units_of(const Tensor& q, const OptionalTensor& mask, bool causal, void* stream) {
  const Tensor units = torch::stable::new_empty(q, {q.size(0), q.size(2)}, ScalarType::Float);
  const CountKeys problem{
      q.size(0), q.size(2), causal, mask.has_value() ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr,
      mask.has_value() ? mask->stride(0) : 0, mask.has_value() ? mask->stride(1) : 0, data_of<float>(units)};
  check_launch(kOp, longvq_cuda_count_keys(&problem, stream));
  return units;
}

}  // namespace

std::tuple<Tensor, Tensor> vq_attention(
    const Tensor& q_given, const Tensor& k_given, const Tensor& v_given, const Tensor& codebook,
    const Tensor& codes_given, const OptionalTensor& bias_given, const OptionalTensor& mask,
    const OptionalTensor& cu_seqlens, double scale, bool causal, int64_t window, const std::string& activation,
    const std::string& local_keys, const std::string&, int64_t near_dim) {
  check_sizes(q_given, k_given, v_given, codebook, codes_given, bias_given, mask, causal, window, near_dim);
  STD_TORCH_CHECK(!cu_seqlens.has_value(), kOp, ": the CUDA kernels don't take packed documents yet");
  const ElementType type = type_of(kOp, q_given);
  const OnDeviceOf device(kOp, q_given);
  const Tensor q = with_dense_rows(q_given), k = with_dense_rows(k_given), v = with_dense_rows(v_given);
  const Tensor codes = torch::stable::contiguous(codes_given);
  const bool laplace = activation == "laplace";

  Attention p{};
  p.type = type;
  p.batch = q.size(0), p.heads = q.size(1), p.kv_heads = k.size(1), p.length = q.size(2), p.values = v.size(3);
  p.near_depth = near_dim > 0 ? near_dim : q.size(3);
  p.far_first = near_dim, p.far_depth = q.size(3) - near_dim;
  p.exact = local_keys == "exact", p.causal = causal, p.laplace = laplace;
  p.window = std::min(window, p.length);  // a wider one sees no more
  p.scale = static_cast<float>(scale);
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.q_batch = q.stride(0), p.q_head = q.stride(1), p.q_length = q.stride(2);
  p.k_batch = k.stride(0), p.k_head = k.stride(1), p.k_length = k.stride(2);
  p.v_batch = v.stride(0), p.v_head = v.stride(1), p.v_length = v.stride(2);
  p.code_of_key = static_cast<const int64_t*>(codes.const_data_ptr());
  if (mask.has_value()) {
    p.ignored = static_cast<const uint8_t*>(mask->const_data_ptr());
    p.ignored_batch = mask->stride(0), p.ignored_length = mask->stride(1);
  }
  OptionalTensor bias;
  if (bias_given.has_value() && window > 0) {
    bias = as_type(*bias_given, ScalarType::Float);
    p.bias_head = bias->stride(0), p.bias_offset = bias->stride(1);
    // Of a bidirectional window wider than the sequence the middle is left.
    const int64_t skipped = causal ? 0 : window - p.window;
    p.bias = static_cast<const float*>(bias->const_data_ptr()) + skipped * p.bias_offset;
  }
  Tensor out = torch::stable::new_empty(v, {p.batch, p.heads, p.length, p.values}, v.scalar_type());
  Tensor normalizers = torch::stable::new_empty(q, {p.batch, p.heads, p.length, 2}, ScalarType::Float);
  if (p.batch == 0 || p.heads == 0 || p.length == 0) {
    return {out, normalizers};
  }
  const int64_t columns = padded_depth(std::max(p.near_depth, p.far_depth));
  const PackedCodebook packed(kOp, codebook, type, near_dim, columns, device.stream());
  p.codebook = packed.codebook;
  OptionalTensor units;
  if (laplace) {
    units = units_of(q, mask, causal, device.stream());
    p.units = static_cast<const float*>(units->const_data_ptr());
  }

  FarField far{};
  far.type = type;
  far.batch = p.batch, far.heads = p.kv_heads, far.length = p.length, far.codes = packed.codebook.codes;
  far.values = p.values, far.causal = causal, far.logarithm = !laplace, far.window = p.window;
  far.code_of_key = p.code_of_key;
  far.v = p.v, far.v_batch = p.v_batch, far.v_head = p.v_head, far.v_length = p.v_length;
  far.ignored = p.ignored, far.ignored_batch = p.ignored_batch, far.ignored_length = p.ignored_length;
  const FarFieldTensors tensors(far, v);
  check_launch(kOp, longvq_cuda_far_field(&far, device.stream()));
  p.means = far.means, p.numbers = far.numbers, p.far_fields = far.far_fields();

  p.out = out.mutable_data_ptr(), p.normalizers = data_of<float>(normalizers);
  check_launch(kOp, longvq_cuda_attention(&p, device.stream()));
  return {out, normalizers};
}

}  // namespace longvq::cuda
