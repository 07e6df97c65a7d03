#include <algorithm>
#include <array>
#include <optional>

#include "../common/status.h"
#include "../operators.h"
#include "attention_call.h"

namespace longvq::cuda {
namespace {

constexpr const char* kOp = AttentionCall::kOp;

// The number of queries that one block of codes visits. With few key-value heads it is only a part of the queries, so
// that a large GPU has enough blocks.
int64_t code_segment_for(const Attention& p) {
  constexpr int64_t kBlocks = 256, kLeast = 8 * kFarBlock;
  const int64_t blocks = p.num_sequences() * p.kv_heads * (padded_codes(p.codebook.num_codes) / kCodePadding);
  const int64_t wanted = std::max<int64_t>(1, std::min(kBlocks / std::max<int64_t>(blocks, 1), p.length / kLeast));
  return std::max(kLeast, (p.length + wanted * kFarBlock - 1) / (wanted * kFarBlock) * kFarBlock);
}

void check_saved(
    const Tensor& grad, const Tensor& out, const Tensor& normalizers, const AttentionInputs& in, const Attention& p) {
  check_same_device(kOp, in.q, {grad, out, normalizers});
  const auto has_columns = [&](const Tensor& x, int64_t columns) {
    return has_sizes(x, {p.batch, p.heads, p.length, columns});
  };
  check(kOp, "grad", grad, has_columns(grad, p.value_dim), "(B, H, L, E), the gradient of the output");
  check(
      kOp, "out", out, has_columns(out, p.value_dim) && out.scalar_type() == in.v.scalar_type(),
      "(B, H, L, E) in the dtype of v, the output");
  check(
      kOp, "normalizers", normalizers, has_columns(normalizers, 2) && normalizers.scalar_type() == ScalarType::Float,
      "(B, H, L, 2) float32");
}

// The results of the backward, and the workspaces of its kernels.
struct Backward {
  AttentionCall& call;
  Attention& p;
  Tensor dq, dk, dv, dbias, dfar_q, dfar_k;
  Tensor grad, out, normalizers, deltas, dbias_per_block, dcodewords, later, earlier, dv_far_before, dv_far_after,
      dv_near, dk_inside, dk_outside;
  std::optional<FarFieldTensors> shared;
  AttentionGradients g{};

  Backward(AttentionCall& attention_call, const AttentionInputs& in)
      : call(attention_call), p(attention_call.p),
        dq(empty({p.batch, p.heads, p.length, p.head_dim}, in.q.scalar_type())),
        dk(empty({p.batch, p.kv_heads, p.length, p.head_dim}, in.k.scalar_type())),
        dv(empty({p.batch, p.kv_heads, p.length, p.value_dim}, in.v.scalar_type())),
        dbias(
            in.bias.has_value() ? new_zeros(in.q, {in.bias->size(0), in.bias->size(1)}, ScalarType::Float)
                                : empty({0}, in.q.scalar_type())),
        dfar_q(
            p.has_far_qk ? empty({p.batch, p.heads, p.length, p.far_head_dim}, in.q.scalar_type())
                         : empty({0}, in.q.scalar_type())),
        dfar_k(
            p.has_far_qk ? empty({p.batch, p.kv_heads, p.length, p.far_head_dim}, in.k.scalar_type())
                         : empty({0}, in.k.scalar_type())) {}

  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type = ScalarType::Float) const {
    return torch::stable::new_empty(call.q, sizes, type);
  }
  Tensor zeros(std::initializer_list<int64_t> sizes) const { return new_zeros(call.q, sizes, ScalarType::Float); }

  void make_deltas(const Tensor& grad_given, const Tensor& out_given, const Tensor& normalizers_given, void* stream);
  void make_gradients(void* stream);
  void finish_keys(KeyGrad key_grad, void* stream);
};

void Backward::make_deltas(
    const Tensor& grad_given, const Tensor& out_given, const Tensor& normalizers_given, void* stream) {
  grad = with_dense_rows(as_type(grad_given, call.v.scalar_type()));
  out = torch::stable::contiguous(out_given);
  normalizers = torch::stable::contiguous(normalizers_given);
  p.normalizers = const_cast<float*>(const_data_of<float>(normalizers));  // read only
  deltas = empty({p.batch, p.heads, p.length});
  const Deltas problem{
      p.type,
      p.batch,
      p.heads,
      p.length,
      p.value_dim,
      grad.const_data_ptr(),
      out.const_data_ptr(),
      strides_of<Strides>(grad),
      p.mask,
      data_of<float>(deltas)};
  check_launch(kOp, longvq_cuda_deltas(&problem, stream));
}

void Backward::make_gradients(void* stream) {
  g.forward = p;
  g.grad = grad.const_data_ptr(), g.grad_strides = strides_of<Strides>(grad), g.deltas = data_of<float>(deltas);
  g.dq = dq.mutable_data_ptr(), g.dfar_q = p.has_far_qk ? dfar_q.mutable_data_ptr() : g.dq;
  if (p.bias != nullptr) {
    dbias_per_block = zeros({p.batch, p.heads, p.num_pieces(kGradientRows), dbias.size(1)});
    g.dbias_per_block = data_of<float>(dbias_per_block);
    g.bias_columns = dbias.size(1), g.bias_skipped = call.bias_skipped;
  }
  g.code_segment = code_segment_for(p);
  const int64_t segments = p.num_pieces(g.code_segment), num_codes = p.codebook.num_codes;
  const bool several = p.length > g.code_segment, keys_after = !p.options.causal && !p.all_far();
  dcodewords = empty({p.batch, p.kv_heads, segments, num_codes, p.far_head_dim});
  later = empty({p.batch, p.kv_heads, several ? segments : 0, num_codes, p.value_dim});
  earlier = empty({p.batch, p.kv_heads, several && keys_after ? segments : 0, num_codes, p.value_dim});
  dv_far_before = zeros({p.batch, p.kv_heads, p.length, p.value_dim});
  dv_far_after = zeros({p.batch, p.kv_heads, keys_after ? p.length : 0, p.value_dim});
  dv_near = empty({p.batch, p.kv_heads, p.length, p.value_dim});
  dk_inside = empty({p.batch, p.kv_heads, p.length, p.head_dim});
  dk_outside = empty({p.batch, p.kv_heads, p.length, p.far_head_dim});
  g.dcodewords = data_of<float>(dcodewords), g.dcode_values = several ? data_of<float>(later) : nullptr;
  g.dv_far_before = data_of<float>(dv_far_before);
  g.dv_far_after = keys_after ? data_of<float>(dv_far_after) : nullptr;
  g.dv_near = data_of<float>(dv_near);
  g.dk_inside = data_of<float>(dk_inside), g.dk_outside = data_of<float>(dk_outside);
  check_launch(kOp, longvq_cuda_attention_gradients(&g, stream));
}

void Backward::finish_keys(KeyGrad key_grad, void* stream) {
  SumSegments sum{};
  static_cast<Sequences&>(sum) = p;
  sum.kv_heads = p.kv_heads, sum.num_codes = p.codebook.num_codes, sum.far_head_dim = p.far_head_dim;
  sum.value_dim = p.value_dim, sum.code_segment = g.code_segment, sum.all_far = p.all_far();
  sum.dcodewords = g.dcodewords, sum.later = g.dcode_values;
  sum.earlier = earlier.numel() > 0 ? data_of<float>(earlier) : nullptr;
  check_launch(kOp, longvq_cuda_sum_segments(&sum, stream));

  FinishKeys finish{};
  static_cast<Sequences&>(finish) = p;
  finish.type = p.type, finish.kv_heads = p.kv_heads, finish.num_codes = p.codebook.num_codes;
  finish.head_dim = p.head_dim, finish.far_head_dim = p.far_head_dim, finish.value_dim = p.value_dim;
  finish.has_far_qk = p.has_far_qk, finish.codes = p.codes, finish.mask = p.mask;
  finish.dk_inside = g.dk_inside, finish.dv_near = g.dv_near;
  finish.dv_far_before = g.dv_far_before, finish.dv_far_after = g.dv_far_after;
  finish.later = sum.later, finish.earlier = sum.earlier;
  finish.window = p.options.window, finish.code_segment = g.code_segment, finish.all_far = sum.all_far;
  finish.dk = dk.mutable_data_ptr(), finish.dfar_k = p.has_far_qk ? dfar_k.mutable_data_ptr() : finish.dk;
  finish.dv = dv.mutable_data_ptr();
  if (key_grad == KeyGrad::kCluster) {
    // The mean of dk_outside over the keys of each code: a far field of all keys, with dk_outside as values.
    FarField mean = call.far_field_problem(ElementType::kFloat, false);
    mean.causal = false, mean.window = 0;
    mean.v = g.dk_outside, mean.v_strides = strides_of<Strides>(dk_outside), mean.value_dim = p.far_head_dim;
    shared.emplace(mean, dk_outside);
    check_launch(kOp, longvq_cuda_far_field(&mean, stream));
    finish.dcodewords = g.dcodewords, finish.counts = mean.counts, finish.means = static_cast<const float*>(mean.means);
  }
  check_launch(kOp, longvq_cuda_finish_keys(&finish, stream));
}

}  // namespace

AttentionResult vq_attention(const AttentionInputs& in, const AttentionOptions& options) {
  const OnDeviceOf device(kOp, in.q);
  AttentionCall call(in, options);
  Attention& p = call.p;
  Tensor out = torch::stable::new_empty(in.v, {p.batch, p.heads, p.length, p.value_dim}, in.v.scalar_type());
  Tensor normalizers = torch::stable::new_empty(in.q, {p.batch, p.heads, p.length, 2}, ScalarType::Float);
  if (call.is_empty()) {
    torch::stable::zero_(normalizers);
  } else {
    call.prepare(in.codebook, true, device.stream());
    p.out = out.mutable_data_ptr(), p.normalizers = data_of<float>(normalizers);
    check_launch(kOp, longvq_cuda_attention(&p, device.stream()));
  }
  return {out, normalizers};
}

AttentionGradientTensors vq_attention_backward(
    const Tensor& grad, const Tensor& out, const Tensor& normalizers, const AttentionInputs& in,
    const AttentionOptions& options) {
  const OnDeviceOf device(kOp, in.q);
  AttentionCall call(in, options);
  check_saved(grad, out, normalizers, in, call.p);
  Backward backward(call, in);
  if (call.is_empty()) {
    // Keys may exist without queries or without values.
    for (Tensor* x : {&backward.dq, &backward.dk, &backward.dv, &backward.dfar_q, &backward.dfar_k}) {
      torch::stable::zero_(*x);
    }
  } else {
    call.prepare(in.codebook, false, device.stream());
    backward.make_deltas(grad, out, normalizers, device.stream());
    backward.make_gradients(device.stream());
    backward.finish_keys(options.key_grad, device.stream());
    if (call.p.bias != nullptr) {
      const std::array<int64_t, 2> axes{0, 2};  // of the batch and of the blocks
      backward.dbias = torch::stable::sum(
          backward.dbias_per_block, torch::headeronly::IntHeaderOnlyArrayRef(axes.data(), axes.size()));
    }
  }
  if (in.bias.has_value()) {
    backward.dbias = as_type(backward.dbias, in.bias->scalar_type());
  }
  return {backward.dq, backward.dk, backward.dv, backward.dbias, backward.dfar_q, backward.dfar_k};
}

}  // namespace longvq::cuda
