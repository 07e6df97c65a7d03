#include "step.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "../../common/cpu_capability.h"
#include "../../common/parallel_items.h"
#include "../../common/tensor_dtype.h"
#include "../attention_operator.h"
#include "block_by_block.h"
#include "call.h"
#include "token_by_token.h"

namespace longvq {
namespace {

using torch::headeronly::ScalarType;
constexpr int64_t kFewTokens = 16;  // below this packing the codebook costs more than it saves

namespace step {
LONGVQ_DEFINE_KERNEL_OF_THIS_CPU(AttentionStepKernel, attention_step_kernel)
}  // namespace step
namespace block {
LONGVQ_DEFINE_KERNEL_OF_THIS_CPU(AttentionKernel, attention_kernel)
}  // namespace block

bool has_sizes(const Tensor& x, std::initializer_list<int64_t> sizes) {
  int64_t axis = 0;
  bool same = x.is_cpu() && x.dim() == static_cast<int64_t>(sizes.size());
  for (auto size = sizes.begin(); same && size != sizes.end(); ++size, ++axis) {
    same = x.size(axis) == *size;
  }
  return same;
}

bool is_state(const Tensor& x, ScalarType type, std::initializer_list<int64_t> sizes) {
  return has_sizes(x, sizes) && x.scalar_type() == type && x.is_contiguous();
}

// Codes in memory that the kernel follows.
void check_codes(const int64_t* codes, int64_t count, int64_t stride, int64_t num_codes) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t code = codes[i * stride];
    STD_TORCH_CHECK(code >= 0 && code < num_codes, "vq_attention_step: codes must lie in [0, S), got ", code);
  }
}

void check_all_codes(const StepProblem& p) {
  for (int64_t row = 0; row < p.batch; ++row) {
    STD_TORCH_CHECK(p.lengths[row] >= 0, "vq_attention_step: lengths must be 0 or more, got ", p.lengths[row]);
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      const StepHead state(p, row, head);
      check_codes(state.ring_codes, state.in_ring(p.lengths[row]), 1, p.num_codes);
      if (p.codes != nullptr) {
        check_codes(
            p.codes + row * p.codes_strides[0] + head * p.codes_strides[1], p.length, p.codes_strides[2], p.num_codes);
      }
    }
  }
}

void run(const StepProblem& p) {
  const int64_t pairs = p.batch * p.kv_heads;
  if (p.length >= kFewTokens && p.codes != nullptr) {
    share_out(
        pairs, [&] { return StepBlockScratch(p); },
        [&](int64_t item, StepBlockScratch& scratch) {
          StepHead head(p, item / p.kv_heads, item % p.kv_heads);
          BlockByBlock(head, scratch).run();
        });
  } else {
    share_out(
        pairs, [&] { return TokenScratch(p); },
        [&](int64_t item, TokenScratch& scratch) {
          StepHead head(p, item / p.kv_heads, item % p.kv_heads);
          TokenByToken(head, scratch).run();
        });
  }
  for (int64_t row = 0; row < p.batch; ++row) {
    for (int64_t t = 0; t < p.length; ++t) {
      p.lengths[row] += !p.ignored(row, t);
    }
  }
}

}  // namespace

Tensor vq_attention_step_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& codebook, const OptionalTensor& codes,
    const OptionalTensor& bias, const OptionalTensor& key_padding_mask, const OptionalTensor& given_far_q,
    const OptionalTensor& given_far_k, const Tensor& far_sums, const Tensor& far_counts, const Tensor& ring_codes,
    const Tensor& ring_keys, const Tensor& ring_values, const Tensor& lengths, double scale, int64_t window,
    int64_t activation) {
  // Python has checked them with better messages: these only keep wrong calls of the bare operator from memory.
  const std::optional<ElementType> type = element_type(q);
  STD_TORCH_CHECK(type.has_value(), "vq_attention_step: the compiled CPU kernel takes float32, bfloat16 or float16");
  const bool has_far_q = given_far_q.has_value(), exact = ring_keys.dim() == 4 && ring_keys.size(3) != 0;
  STD_TORCH_CHECK(
      given_far_k.has_value() == has_far_q && (!has_far_q || exact || window == 0),
      "vq_attention_step: far_q and far_k must be given together, with a state that has exact keys");
  const Tensor &far_q = has_far_q ? *given_far_q : q, &far_k = has_far_q ? *given_far_k : k;
  for (const Tensor* x : {&q, &k, &v, &far_q, &far_k}) {
    STD_TORCH_CHECK(
        x->is_cpu() && x->dim() == 4 && x->scalar_type() == q.scalar_type(),
        "vq_attention_step: q, k, v, far_q and far_k must have four dimensions and one dtype");
  }
  STD_TORCH_CHECK(
      codebook.is_cpu() && codebook.dim() == 3 && codebook.scalar_type() == ScalarType::Float,
      "vq_attention_step: codebook must be (Hkv, S, D), float32");
  const int64_t batch = q.size(0), heads = q.size(1), length = q.size(2), depth = q.size(3);
  const int64_t far_depth = far_q.size(3);
  const int64_t kv_heads = k.size(1), values = v.size(3), num_codes = codebook.size(1);
  const int64_t reach = std::max<int64_t>(window - 1, 0);
  STD_TORCH_CHECK(
      kv_heads >= 1 && heads % kv_heads == 0 && depth >= 1 && far_depth >= 1 && values >= 1 && num_codes >= 1 &&
          window >= 0,
      "vq_attention_step: wrong sizes");
  STD_TORCH_CHECK(
      has_sizes(k, {batch, kv_heads, length, depth}) && has_sizes(v, {batch, kv_heads, length, values}) &&
          has_sizes(far_q, {batch, heads, length, far_depth}) &&
          has_sizes(far_k, {batch, kv_heads, length, far_depth}) &&
          has_sizes(codebook, {kv_heads, num_codes, far_depth}),
      "vq_attention_step: shapes of q, k, v, codebook, far_q and far_k do not fit each other");
  STD_TORCH_CHECK(
      !codes.has_value() || (has_sizes(*codes, {batch, kv_heads, length}) && codes->scalar_type() == ScalarType::Long),
      "vq_attention_step: codes must be (B, Hkv, T), int64");
  STD_TORCH_CHECK(
      !bias.has_value() || (has_sizes(*bias, {heads, window}) && bias->scalar_type() == ScalarType::Float),
      "vq_attention_step: bias must be (H, W), float32");
  STD_TORCH_CHECK(
      !key_padding_mask.has_value() ||
          (has_sizes(*key_padding_mask, {batch, length}) && key_padding_mask->scalar_type() == ScalarType::Bool),
      "vq_attention_step: key_padding_mask must be (B, T), bool");
  STD_TORCH_CHECK(
      is_state(far_sums, ScalarType::Float, {batch, kv_heads, num_codes, values}) &&
          is_state(far_counts, ScalarType::Long, {batch, kv_heads, num_codes}) &&
          is_state(ring_codes, ScalarType::Long, {batch, kv_heads, reach}) &&
          is_state(ring_keys, ScalarType::Float, {batch, kv_heads, reach, exact ? depth : 0}) &&
          is_state(ring_values, ScalarType::Float, {batch, kv_heads, reach, values}) &&
          is_state(lengths, ScalarType::Long, {batch}),
      "vq_attention_step: the state does not fit q, k, v, codebook and window, or is not contiguous");

  const Tensor out = torch::stable::new_empty(v, {batch, heads, length, values}, q.scalar_type());
  if (batch == 0 || heads == 0 || length == 0) {
    return out;
  }
  const Tensor table = codebook.stride(2) == 1 ? codebook : torch::stable::contiguous(codebook);
  OptionalTensor biases;
  if (bias.has_value() && window > 0) {
    biases = torch::stable::contiguous(*bias);
  }
  StepProblem p{
      StepInput(q, *type),
      StepInput(k, *type),
      StepInput(v, *type),
      StepInput(far_q, *type),
      StepInput(far_k, *type),
      {out.mutable_data_ptr(), *type, values},
      static_cast<const float*>(table.const_data_ptr()),
      table.stride(0),
      table.stride(1),
      nullptr,
      {},
      nullptr,
      nullptr,
      {},
      static_cast<float*>(far_sums.mutable_data_ptr()),
      static_cast<float*>(ring_keys.mutable_data_ptr()),
      static_cast<float*>(ring_values.mutable_data_ptr()),
      static_cast<int64_t*>(far_counts.mutable_data_ptr()),
      static_cast<int64_t*>(ring_codes.mutable_data_ptr()),
      static_cast<int64_t*>(lengths.mutable_data_ptr()),
      static_cast<float>(scale),
      window,
      reach,
      choice_of<Activation>("vq_attention_step", "activation", activation),
      exact && window > 0,
      has_far_q,
      batch,
      heads,
      kv_heads,
      heads / kv_heads,
      length,
      depth,
      far_depth,
      values,
      num_codes,
      0,
      step::kernel_of_this_cpu(),
      block::kernel_of_this_cpu()};
  if (codes.has_value()) {
    p.codes = static_cast<const int64_t*>(codes->const_data_ptr());
    std::copy_n(
        std::initializer_list<int64_t>{codes->stride(0), codes->stride(1), codes->stride(2)}.begin(), 3,
        p.codes_strides);
  }
  if (biases.has_value()) {
    p.bias = static_cast<const float*>(biases->const_data_ptr());
  }
  if (key_padding_mask.has_value()) {
    p.mask = static_cast<const bool*>(key_padding_mask->const_data_ptr());
    p.mask_strides[0] = key_padding_mask->stride(0);
    p.mask_strides[1] = key_padding_mask->stride(1);
  }
  check_all_codes(p);
  p.most_near = std::min(reach, *std::max_element(p.lengths, p.lengths + batch) + length);
  run(p);
  return out;
}

}  // namespace longvq
