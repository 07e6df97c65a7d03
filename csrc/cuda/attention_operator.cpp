#include <algorithm>
#include <array>
#include <optional>

#include "operators.h"

namespace longvq::cuda {
namespace {

constexpr const char* kOp = "vq_attention";

void check_sizes(const AttentionInputs& in, const AttentionOptions& options) {
  const Tensor &q = in.q, &k = in.k, &v = in.v, &codebook = in.codebook, &codes = in.codes;
  const OptionalTensor &bias = in.bias, &mask = in.key_padding_mask;
  const int64_t window = options.window;
  STD_TORCH_CHECK(
      q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && codebook.dim() == 3 && codes.dim() == 3, kOp,
      ": expected q (B, H, L, D), k (B, Hkv, L, D), v (B, Hkv, L, E), codebook (Hkv, S, D) and codes (B, Hkv, L)");
  const int64_t batch = q.size(0), heads = q.size(1), length = q.size(2), depth = q.size(3), kv_heads = k.size(1);
  STD_TORCH_CHECK(
      k.size(0) == batch && k.size(2) == length && k.size(3) == depth && v.size(0) == batch && v.size(1) == kv_heads &&
          v.size(2) == length && codebook.size(0) == kv_heads && codebook.size(1) >= 1 &&
          (in.far_q.has_value() || codebook.size(2) == depth) && codes.size(0) == batch && codes.size(1) == kv_heads &&
          codes.size(2) == length && kv_heads > 0 && heads % kv_heads == 0,
      kOp, ": q, k, v, codebook and codes don't belong together");
  STD_TORCH_CHECK(
      q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), kOp, ": q, k and v must have one type");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Long, kOp, ": codes must be int64");
  STD_TORCH_CHECK(
      in.far_k.has_value() == in.far_q.has_value() &&
          (!in.far_q.has_value() || options.local_keys == LocalKeys::kExact),
      kOp, ": far_q and far_k must be given together, with exact local_keys");
  if (in.far_q.has_value()) {
    const Tensor &far_q = *in.far_q, &far_k = *in.far_k;
    const auto has_sizes = [&](const Tensor& x, int64_t of_heads) {
      return x.dim() == 4 && x.size(0) == batch && x.size(1) == of_heads && x.size(2) == length &&
             x.size(3) == codebook.size(2) && x.scalar_type() == q.scalar_type();
    };
    STD_TORCH_CHECK(
        has_sizes(far_q, heads) && has_sizes(far_k, kv_heads), kOp,
        ": far_q must be (B, H, L, F) and far_k (B, Hkv, L, F), with the F of the codebook and the type of q");
  }
  STD_TORCH_CHECK(
      !bias.has_value() ||
          (bias->dim() == 2 && bias->size(0) == heads && bias->size(1) == (options.causal ? window : 2 * window - 1)),
      kOp, ": bias must be (H, W), bidirectional (H, 2 W - 1)");
  STD_TORCH_CHECK(
      !mask.has_value() || (mask->dim() == 2 && mask->size(0) == batch && mask->size(1) == length &&
                            mask->scalar_type() == ScalarType::Bool),
      kOp, ": key_padding_mask must be (B, L), bool");
}

// How many queries each block of codes goes past: with few heads of keys not all, so that a large GPU has enough
// blocks.
int64_t code_segment_for(const Attention& p) {
  constexpr int64_t kBlocks = 256, kLeast = 8 * kFarBlock;
  const int64_t blocks = p.sequences() * p.kv_heads * (padded_codes(p.codebook.codes) / kCodeUnit);
  const int64_t wanted = std::max<int64_t>(1, std::min(kBlocks / std::max<int64_t>(blocks, 1), p.length / kLeast));
  return std::max(kLeast, (p.length + wanted * kFarBlock - 1) / (wanted * kFarBlock) * kFarBlock);
}

// One over the number of keys that each query may attend, (B, L).
Tensor units_of(const Tensor& q, const Attention& p, void* stream) {
  const Tensor units = torch::stable::new_empty(q, {p.batch, p.length}, ScalarType::Float);
  const CountKeys problem{p, p.causal, p.ignored, p.ignored_batch, p.ignored_length, data_of<float>(units)};
  check_launch(kOp, longvq_cuda_count_keys(&problem, stream));
  return units;
}

// The tensors of a call, as the kernels take them; what points into them lives as long.
struct Call {
  Tensor q, k, v, codes;
  OptionalTensor offsets, bias, units;
  std::optional<PackedCodebook> packed;
  std::optional<FarFieldTensors> far_tensors;
  Attention p{};
  int64_t bias_skipped = 0;  // entries of a bidirectional bias on either side that a shorter sequence has no pairs for

  Call(const AttentionInputs& in, const AttentionOptions& options);

  bool empty() const { return p.batch == 0 || p.heads == 0 || p.length == 0 || p.values == 0; }
  void prepare(const Tensor& codebook, bool logarithms, void* stream);
  FarField far_field(ElementType type, bool logarithms) const;
};

// The columns of a, then those of b.
Tensor joined(const Tensor& a, const OptionalTensor& b) {
  if (!b.has_value()) {
    return a;
  }
  Tensor both = torch::stable::new_empty(a, {a.size(0), a.size(1), a.size(2), a.size(3) + b->size(3)}, a.scalar_type());
  Tensor first = torch::stable::narrow(both, 3, 0, a.size(3)),
         rest = torch::stable::narrow(both, 3, a.size(3), b->size(3));
  torch::stable::copy_(first, a);
  torch::stable::copy_(rest, *b);
  return both;
}

const AttentionInputs& checked(const AttentionInputs& in, const AttentionOptions& options) {
  check_sizes(in, options);
  check_devices(
      kOp, in.q, {in.k, in.v, in.codebook, in.codes, in.bias, in.key_padding_mask, in.cu_seqlens, in.far_q, in.far_k});
  return in;
}

Call::Call(const AttentionInputs& in, const AttentionOptions& options)
    : q(with_dense_rows(joined(checked(in, options).q, in.far_q))), k(with_dense_rows(in.k)), v(with_dense_rows(in.v)),
      codes(torch::stable::contiguous(in.codes)) {
  const OptionalTensor &mask = in.key_padding_mask, &bias_given = in.bias;
  const int64_t window = options.window, near_dim = in.far_q.has_value() ? in.q.size(3) : 0;
  const bool causal = options.causal;
  static_cast<Sequences&>(p) = sequences_of(kOp, q.size(0), q.size(2), in.cu_seqlens, offsets);
  p.type = type_of(kOp, q);
  p.heads = q.size(1), p.kv_heads = k.size(1), p.values = v.size(3);
  p.near_depth = near_dim > 0 ? near_dim : q.size(3);
  p.far_first = near_dim, p.far_depth = q.size(3) - near_dim;
  p.exact = options.local_keys == LocalKeys::kExact, p.causal = causal;
  p.laplace = options.activation == Activation::kLaplace;
  // Weights of laplace count keys, and may leave the range of float16.
  STD_TORCH_CHECK(
      !p.laplace || p.type != ElementType::kHalf, kOp, ": the CUDA kernels take laplace in float32 and bfloat16 only");
  STD_TORCH_CHECK(
      std::max(p.near_depth, p.far_depth) <= kMaxAttentionDepth, kOp, ": the CUDA kernels take heads of up to ",
      kMaxAttentionDepth, " columns of q and k, got ", std::max(p.near_depth, p.far_depth));
  p.window = std::min(window, p.length);  // a wider one sees no more
  p.scale = options.scale;
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.q_batch = q.stride(0), p.q_head = q.stride(1), p.q_length = q.stride(2);
  p.k_batch = k.stride(0), p.k_head = k.stride(1), p.k_length = k.stride(2);
  p.v_batch = v.stride(0), p.v_head = v.stride(1), p.v_length = v.stride(2);
  p.code_of_key = static_cast<const int64_t*>(codes.const_data_ptr());
  if (mask.has_value()) {
    p.ignored = static_cast<const uint8_t*>(mask->const_data_ptr());
    p.ignored_batch = mask->stride(0), p.ignored_length = mask->stride(1);
  }
  if (bias_given.has_value() && window > 0) {
    bias = as_type(*bias_given, ScalarType::Float);
    p.bias_head = bias->stride(0), p.bias_offset = bias->stride(1);
    bias_skipped = causal ? 0 : window - p.window;
    p.bias = static_cast<const float*>(bias->const_data_ptr()) + bias_skipped * p.bias_offset;
  }
}

FarField Call::far_field(ElementType type, bool logarithms) const {
  FarField far{};
  static_cast<Sequences&>(far) = p;
  far.type = type, far.heads = p.kv_heads, far.codes = packed->codebook.codes;
  far.values = p.values, far.causal = p.causal, far.logarithm = logarithms, far.window = p.window;
  far.code_of_key = p.code_of_key;
  far.v = p.v, far.v_batch = p.v_batch, far.v_head = p.v_head, far.v_length = p.v_length;
  far.ignored = p.ignored, far.ignored_batch = p.ignored_batch, far.ignored_length = p.ignored_length;
  return far;
}

// Packed codebook, units, far fields.
void Call::prepare(const Tensor& codebook, bool logarithms, void* stream) {
  const int64_t columns = padded_depth(std::max(p.near_depth, p.far_depth));
  packed.emplace(kOp, codebook, p.type, 0, columns, stream);
  p.codebook = packed->codebook;
  if (p.laplace) {
    units = units_of(q, p, stream);
    p.units = static_cast<const float*>(units->const_data_ptr());
  }
  FarField far = far_field(p.type, logarithms && !p.laplace);
  far_tensors.emplace(far, v);
  check_launch(kOp, longvq_cuda_far_field(&far, stream));
  p.means = far.means, p.numbers = far.numbers, p.far_fields = far.far_fields();
}

}  // namespace

AttentionResult vq_attention(const AttentionInputs& inputs, const AttentionOptions& options) {
  const OnDeviceOf device(kOp, inputs.q);
  Call call(inputs, options);
  const Tensor &q = inputs.q, &v = inputs.v;
  Attention& p = call.p;
  Tensor out = torch::stable::new_empty(v, {p.batch, p.heads, p.length, p.values}, v.scalar_type());
  Tensor normalizers = torch::stable::new_empty(q, {p.batch, p.heads, p.length, 2}, ScalarType::Float);
  if (call.empty()) {
    torch::stable::zero_(normalizers);
  } else {
    call.prepare(inputs.codebook, true, device.stream());
    p.out = out.mutable_data_ptr(), p.normalizers = data_of<float>(normalizers);
    check_launch(kOp, longvq_cuda_attention(&p, device.stream()));
  }
  return {out, normalizers};
}

AttentionGradientTensors vq_attention_backward(
    const Tensor& grad_given, const Tensor& out_given, const Tensor& normalizers_given, const AttentionInputs& inputs,
    const AttentionOptions& options) {
  const OnDeviceOf device(kOp, inputs.q);
  void* stream = device.stream();
  Call call(inputs, options);
  Attention& p = call.p;
  const Tensor &q = call.q, &v = inputs.v;
  const OptionalTensor& bias = inputs.bias;
  const auto empty = [&](std::initializer_list<int64_t> sizes, ScalarType type) {
    return torch::stable::new_empty(q, sizes, type);
  };
  const auto zeros = [&](std::initializer_list<int64_t> sizes) {
    Tensor x = empty(sizes, ScalarType::Float);
    torch::stable::zero_(x);
    return x;
  };
  check_devices(kOp, q, {grad_given, out_given, normalizers_given});
  const auto check_shape = [&](const Tensor& x, int64_t columns, const char* what) {
    STD_TORCH_CHECK(
        x.dim() == 4 && x.size(0) == p.batch && x.size(1) == p.heads && x.size(2) == p.length && x.size(3) == columns,
        kOp, ": ", what);
  };
  check_shape(grad_given, p.values, "grad must have the shape of the output");
  check_shape(out_given, p.values, "out must be what the forward returned");
  check_shape(normalizers_given, 2, "normalizers must be (B, H, L, 2)");
  STD_TORCH_CHECK(
      out_given.scalar_type() == v.scalar_type() && normalizers_given.scalar_type() == ScalarType::Float, kOp,
      ": out must have the type of v, and normalizers must be float32");
  Tensor dq = empty({p.batch, p.heads, p.length, q.size(3)}, q.scalar_type());
  Tensor dk = empty({p.batch, p.kv_heads, p.length, q.size(3)}, q.scalar_type());
  Tensor dv = empty({p.batch, p.kv_heads, p.length, p.values}, v.scalar_type());
  Tensor dbias = bias.has_value() ? zeros({bias->size(0), bias->size(1)}) : empty({0}, q.scalar_type());
  if (call.empty()) {
    // Of keys that no head of queries looks at, and where there are no values to weigh.
    torch::stable::zero_(dq), torch::stable::zero_(dk), torch::stable::zero_(dv);
  } else {
    call.prepare(inputs.codebook, false, stream);
    const Tensor grad = with_dense_rows(as_type(grad_given, v.scalar_type()));
    const Tensor out = torch::stable::contiguous(out_given);
    const Tensor normalizers = torch::stable::contiguous(normalizers_given);
    const Tensor deltas = empty({p.batch, p.heads, p.length}, ScalarType::Float);
    const Deltas before{
        p.type,
        p.batch,
        p.heads,
        p.length,
        p.values,
        grad.const_data_ptr(),
        out.const_data_ptr(),
        grad.stride(0),
        grad.stride(1),
        grad.stride(2),
        p.ignored,
        p.ignored_batch,
        p.ignored_length,
        data_of<float>(deltas)};
    check_launch(kOp, longvq_cuda_deltas(&before, stream));

    p.normalizers = const_cast<float*>(const_data_of<float>(normalizers));  // read only
    AttentionGradients g{};
    g.forward = p;
    g.grad = before.grad, g.grad_batch = before.grad_batch, g.grad_head = before.grad_head;
    g.grad_length = before.grad_length, g.deltas = before.deltas, g.dq = dq.mutable_data_ptr();
    const int64_t blocks = p.pieces(kGradientRows);
    const bool biased = p.bias != nullptr;
    const Tensor of_blocks = zeros({p.batch, p.heads, biased ? blocks : 0, biased ? bias->size(1) : 0});
    if (biased) {
      g.dbias_of_blocks = data_of<float>(of_blocks);
      g.bias_columns = bias->size(1), g.bias_skipped = call.bias_skipped;
    }
    g.code_segment = code_segment_for(p);
    const int64_t segments = p.pieces(g.code_segment), codes_of_all = p.codebook.codes;
    const bool several = p.length > g.code_segment, behind = !p.causal && !p.all_far();
    const Tensor dcodes = empty({p.batch, p.kv_heads, segments, codes_of_all, p.far_depth}, ScalarType::Float);
    const auto values_of_segments = [&](bool needed) {
      return empty({p.batch, p.kv_heads, needed ? segments : 0, codes_of_all, p.values}, ScalarType::Float);
    };
    const Tensor later = values_of_segments(several), earlier = values_of_segments(several && behind);
    g.code_values = several ? data_of<float>(later) : nullptr;
    const Tensor dv_far = zeros({p.batch, p.kv_heads, p.length, p.values});
    const Tensor dv_ahead = zeros({p.batch, p.kv_heads, behind ? p.length : 0, p.values});
    const Tensor dv_near = empty({p.batch, p.kv_heads, p.length, p.values}, ScalarType::Float);
    const Tensor dk_inside = empty({p.batch, p.kv_heads, p.length, p.near_depth}, ScalarType::Float);
    const Tensor dk_outside = empty({p.batch, p.kv_heads, p.length, p.far_depth}, ScalarType::Float);
    g.dcodes = data_of<float>(dcodes), g.dv_far = data_of<float>(dv_far);
    g.dv_ahead = behind ? data_of<float>(dv_ahead) : nullptr, g.dv_near = data_of<float>(dv_near);
    g.dk_inside = data_of<float>(dk_inside), g.dk_outside = data_of<float>(dk_outside);
    check_launch(kOp, longvq_cuda_attention_gradients(&g, stream));

    SumSegments sum{};
    static_cast<Sequences&>(sum) = p;
    sum.heads = p.kv_heads, sum.codes = codes_of_all, sum.far_depth = p.far_depth, sum.values = p.values;
    sum.code_segment = g.code_segment, sum.dcodes = g.dcodes;
    sum.later = g.code_values, sum.earlier = several && behind ? data_of<float>(earlier) : nullptr;
    sum.all_far = p.all_far();
    check_launch(kOp, longvq_cuda_sum_segments(&sum, stream));

    FinishKeys finish{};
    static_cast<Sequences&>(finish) = p;
    finish.type = p.type, finish.heads = p.kv_heads;
    finish.codes = p.codebook.codes, finish.near_depth = p.near_depth, finish.far_depth = p.far_depth;
    finish.far_first = p.far_first, finish.values = p.values, finish.code_of_key = p.code_of_key;
    finish.ignored = p.ignored, finish.ignored_batch = p.ignored_batch, finish.ignored_length = p.ignored_length;
    finish.dk_inside = g.dk_inside, finish.dv_near = g.dv_near, finish.dv_far = g.dv_far, finish.dv_ahead = g.dv_ahead;
    finish.later = sum.later, finish.earlier = sum.earlier, finish.window = p.window;
    finish.code_segment = g.code_segment, finish.all_far = sum.all_far;
    finish.dk = dk.mutable_data_ptr(), finish.dv = dv.mutable_data_ptr();
    std::optional<FarFieldTensors> shared;
    if (options.key_grad == KeyGrad::kCluster) {
      // The mean over the keys of each code: a far field that everybody sees.
      FarField mean = call.far_field(ElementType::kFloat, false);
      mean.causal = false, mean.window = 0;
      mean.v = g.dk_outside, mean.values = p.far_depth;
      mean.v_length = p.far_depth, mean.v_head = p.length * p.far_depth, mean.v_batch = p.kv_heads * mean.v_head;
      shared.emplace(mean, dk_outside);
      check_launch(kOp, longvq_cuda_far_field(&mean, stream));
      finish.dcodes = g.dcodes, finish.numbers = mean.numbers, finish.means = static_cast<const float*>(mean.means);
    }
    check_launch(kOp, longvq_cuda_finish_keys(&finish, stream));
    if (biased) {
      const std::array<int64_t, 2> over{0, 2};
      dbias = torch::stable::sum(of_blocks, torch::headeronly::IntHeaderOnlyArrayRef(over.data(), over.size()));
    }
  }
  if (bias.has_value()) {
    dbias = as_type(dbias, bias->scalar_type());
  }
  if (!inputs.far_q.has_value()) {
    return {dq, dk, dv, dbias, empty({0}, q.scalar_type()), empty({0}, q.scalar_type())};
  }
  const auto columns = [](Tensor& x, int64_t first, int64_t count) {
    return torch::stable::contiguous(torch::stable::narrow(x, 3, first, count));
  };
  const int64_t near = p.near_depth, far = p.far_depth;
  return {columns(dq, 0, near), columns(dk, 0, near), dv, dbias, columns(dq, near, far), columns(dk, near, far)};
}

}  // namespace longvq::cuda
