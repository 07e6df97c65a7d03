#include "attention_call.h"

#include <algorithm>

#include "../common/status.h"

namespace longvq::cuda {
namespace {

void check_inputs(const AttentionInputs& in, const AttentionOptions& options) {
  constexpr const char* kOp = AttentionCall::kOp;
  const Tensor &q = in.q, &k = in.k, &v = in.v, &codebook = in.codebook;
  check(kOp, "q", q, q.dim() == 4, "(B, H, L, D)");
  check(kOp, "k", k, k.dim() == 4, "(B, Hkv, L, D)");
  const int64_t batch = q.size(0), heads = q.size(1), length = q.size(2), kv_heads = k.size(1);
  const auto is_like_q = [&](const Tensor& x, int64_t num_heads, int64_t columns) {
    return has_sizes(x, {batch, num_heads, length, columns}) && x.scalar_type() == q.scalar_type();
  };
  check(
      kOp, "k", k, kv_heads > 0 && heads % kv_heads == 0 && is_like_q(k, kv_heads, q.size(3)),
      "(B, Hkv, L, D) with the B, L, D and dtype of q, and Hkv a divisor of H");
  check(kOp, "v", v, is_like_q(v, kv_heads, kAnySize), "(B, Hkv, L, E) with the sizes of k and the dtype of q");
  STD_TORCH_CHECK(
      in.far_q.has_value() == in.far_k.has_value(), kOp, ": far_q and far_k must be given together, got ",
      in.far_q.has_value() ? "far_q" : "far_k", " alone");
  const int64_t far_head_dim = in.far_q.has_value() && in.far_q->dim() == 4 ? in.far_q->size(3) : q.size(3);
  if (in.far_q.has_value()) {
    STD_TORCH_CHECK(
        options.local_keys == LocalKeys::kExact, kOp, ": local_keys must be exact with far_q, got quantized");
    check(kOp, "far_q", *in.far_q, is_like_q(*in.far_q, heads, kAnySize), "(B, H, L, F) with the sizes and dtype of q");
    check(
        kOp, "far_k", *in.far_k, is_like_q(*in.far_k, kv_heads, far_head_dim),
        "(B, Hkv, L, F) with the sizes and dtype of k and the F of far_q");
  }
  check(
      kOp, "codebook", codebook, has_sizes(codebook, {kv_heads, kAnySize, far_head_dim}) && codebook.size(1) >= 1,
      "(Hkv, S, D) with S >= 1 and the D of k, or of far_k");
  check(
      kOp, "codes", in.codes,
      has_sizes(in.codes, {batch, kv_heads, length}) && in.codes.scalar_type() == ScalarType::Long,
      "(B, Hkv, L) int64");
  if (in.bias.has_value()) {
    const int64_t columns = options.causal ? options.window : std::max<int64_t>(2 * options.window - 1, 0);
    check(kOp, "bias", *in.bias, has_sizes(*in.bias, {heads, columns}), "(H, W), or bidirectional (H, 2 W - 1)");
  }
  check_mask(kOp, in.key_padding_mask, batch, length);
  check_same_device(
      kOp, q, {k, v, codebook, in.codes, in.bias, in.key_padding_mask, in.cu_seqlens, in.far_q, in.far_k});
  const ElementType type = checked_type(kOp, "q", q);
  check(
      kOp, "q", q, options.activation != Activation::kLaplace || type != ElementType::kHalf,
      "float32 or bfloat16 with laplace in the CUDA kernels; its weights may leave the range of float16");
  const int64_t most = std::max(q.size(3), far_head_dim);
  STD_TORCH_CHECK(
      most <= kMaxAttentionHeadDim, kOp, ": D must be at most ", kMaxAttentionHeadDim, " for the CUDA kernels, got ",
      most);
}

const AttentionInputs& checked(const AttentionInputs& in, const AttentionOptions& options) {
  check_inputs(in, options);
  return in;
}

}  // namespace

FarFieldTensors::FarFieldTensors(FarField& p, const Tensor& like) {
  const auto empty = [&](std::initializer_list<int64_t> sizes, ScalarType type) {
    return torch::stable::new_empty(like, sizes, type);
  };
  const int64_t fields = p.num_far_fields(), padded = padded_codes(p.num_codes);
  const int64_t before = p.causal || p.all_far() ? 0 : fields;
  segment_sums = empty({p.batch, p.kv_heads, p.num_segments(), p.num_codes, p.value_dim}, ScalarType::Float);
  segment_counts = empty({p.batch, p.kv_heads, p.num_segments(), p.num_codes}, ScalarType::Int);
  before_sums = empty({p.batch, p.kv_heads, before, p.num_codes, p.value_dim}, ScalarType::Float);
  before_counts = empty({p.batch, p.kv_heads, before, p.num_codes}, ScalarType::Int);
  means = empty({p.batch, p.kv_heads, fields, padded, padded_value_dim(p.value_dim)}, like.scalar_type());
  counts = empty({p.batch, p.kv_heads, fields, padded}, ScalarType::Float);
  p.segment_sums = data_of<float>(segment_sums), p.segment_counts = data_of<int32_t>(segment_counts);
  p.before_sums = data_of<float>(before_sums), p.before_counts = data_of<int32_t>(before_counts);
  p.means = means.mutable_data_ptr(), p.counts = data_of<float>(counts);
}

AttentionCall::AttentionCall(const AttentionInputs& in, const AttentionOptions& options)
    : q(with_dense_rows(checked(in, options).q)), k(with_dense_rows(in.k)), v(with_dense_rows(in.v)),
      far_q(in.far_q.has_value() ? with_dense_rows(*in.far_q) : q), codes(torch::stable::contiguous(in.codes)) {
  static_cast<Sequences&>(p) = sequences_of(kOp, q.size(0), q.size(2), in.cu_seqlens, offsets);
  p.type = checked_type(kOp, "q", q);
  p.heads = q.size(1), p.kv_heads = k.size(1);
  p.head_dim = q.size(3), p.far_head_dim = far_q.size(3), p.value_dim = v.size(3);
  p.has_far_qk = in.far_q.has_value();
  p.options = options;
  p.options.window = std::min(options.window, p.length);  // a wider window has no more keys
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr(), p.far_q = far_q.const_data_ptr();
  p.q_strides = strides_of<Strides>(q), p.far_q_strides = strides_of<Strides>(far_q);
  p.k_strides = strides_of<Strides>(k), p.v_strides = strides_of<Strides>(v);
  p.codes = const_data_of<int64_t>(codes);
  p.mask = padding_mask(in.key_padding_mask);
  if (in.bias.has_value() && options.window > 0) {
    bias = as_type(*in.bias, ScalarType::Float);
    p.bias_head_stride = bias->stride(0), p.bias_offset_stride = bias->stride(1);
    bias_skipped = options.causal ? 0 : options.window - p.options.window;
    p.bias = const_data_of<float>(*bias) + bias_skipped * p.bias_offset_stride;
  }
}

FarField AttentionCall::far_field_problem(ElementType type, bool log_counts) const {
  FarField far{};
  static_cast<Sequences&>(far) = p;
  far.type = type, far.kv_heads = p.kv_heads, far.num_codes = packed->codebook.num_codes, far.value_dim = p.value_dim;
  far.causal = p.options.causal, far.log_counts = log_counts, far.window = p.options.window;
  far.codes = p.codes, far.v = p.v, far.v_strides = p.v_strides, far.mask = p.mask;
  return far;
}

void AttentionCall::prepare(const Tensor& codebook, bool log_counts, void* stream) {
  packed.emplace(kOp, codebook, p.type, padded_head_dim(std::max(p.head_dim, p.far_head_dim)), stream);
  p.codebook = packed->codebook;
  if (p.laplace()) {
    inverse_num_keys = torch::stable::new_empty(q, {p.batch, p.length}, ScalarType::Float);
    const CountAllowedKeys counting{p, p.options.causal, p.mask, data_of<float>(*inverse_num_keys)};
    check_launch(kOp, longvq_cuda_count_allowed_keys(&counting, stream));
    p.inverse_num_keys = counting.inverse_num_keys;
  }
  FarField far = far_field_problem(p.type, log_counts && !p.laplace());
  far_field.emplace(far, v);
  check_launch(kOp, longvq_cuda_far_field(&far, stream));
  p.means = far.means, p.counts = far.counts, p.num_far_fields = far.num_far_fields();
}

}  // namespace longvq::cuda
