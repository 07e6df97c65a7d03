#include "step.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "../../common/check_tensor.h"
#include "../../common/cpu_capability.h"
#include "../../common/parallel_items.h"
#include "../../common/tensor_dtype.h"
#include "../assign/assign.h"
#include "../attention_operator.h"
#include "block_by_block.h"
#include "call.h"
#include "token_by_token.h"

namespace longvq {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* kOp = "vq_attention_step";

// Shorter inputs are processed token by token: for them, packing the codebook costs more than it saves.
constexpr int64_t kMinBlockTokens = 16;

namespace step {
LONGVQ_DEFINE_KERNEL_OF_THIS_CPU(AttentionStepKernel, attention_step_kernel)
}  // namespace step
namespace block {
LONGVQ_DEFINE_KERNEL_OF_THIS_CPU(AttentionKernel, attention_kernel)
}  // namespace block

void check_state(const char* name, const Tensor& x, ScalarType type, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(
      x.is_cpu() && has_sizes(x, sizes) && x.scalar_type() == type && x.is_contiguous(), kOp, ": ", name, " must be ",
      sizes_text(sizes), " ", dtype_name(type), " on the CPU, contiguous, got ", tensor_text(x));
}

void check_all_codes(const StepCall& call) {
  for (int64_t row = 0; row < call.batch; ++row) {
    STD_TORCH_CHECK(call.lengths[row] >= 0, kOp, ": lengths must be at least 0, got ", call.lengths[row]);
    for (int64_t head = 0; head < call.kv_heads; ++head) {
      const StepHead state(call, row, head);
      check_codes(kOp, state.ring_codes, state.in_ring(call.lengths[row]), 1, call.num_codes);
      if (call.codes != nullptr) {
        check_codes(
            kOp, call.codes + row * call.codes_strides[0] + head * call.codes_strides[1], call.length,
            call.codes_strides[2], call.num_codes);
      }
    }
  }
}

// Advances the state and writes the output, with all threads.
void run(const StepCall& call) {
  const int64_t pairs = call.batch * call.kv_heads;
  if (call.length >= kMinBlockTokens) {
    parallel_items(
        pairs, [&] { return BlockScratch(call); },
        [&](int64_t item, BlockScratch& scratch) {
          StepHead head(call, item / call.kv_heads, item % call.kv_heads);
          BlockByBlock(head, scratch).run();
        });
  } else {
    parallel_items(
        pairs, [&] { return TokenScratch(call); },
        [&](int64_t item, TokenScratch& scratch) {
          StepHead head(call, item / call.kv_heads, item % call.kv_heads);
          TokenByToken(head, scratch).run();
        });
  }
  for (int64_t row = 0; row < call.batch; ++row) {
    for (int64_t t = 0; t < call.length; ++t) {
      call.lengths[row] += !call.ignored(row, t);
    }
  }
}

}  // namespace

Tensor vq_attention_step_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& codebook, const OptionalTensor& given_codes,
    const OptionalTensor& bias, const OptionalTensor& key_padding_mask, const OptionalTensor& given_far_q,
    const OptionalTensor& given_far_k, const Tensor& far_sums, const Tensor& far_counts, const Tensor& ring_codes,
    const Tensor& ring_keys, const Tensor& ring_values, const Tensor& lengths, double scale, int64_t window,
    int64_t activation) {
  // Python checks the same first, with better messages. Calls through torch.ops skip Python, so memory safety depends
  // on these checks.
  const std::optional<ElementType> type = element_type(q);
  STD_TORCH_CHECK(
      type.has_value(), kOp, ": q must be float32, bfloat16 or float16 for the compiled CPU kernel, got ",
      dtype_name(q.scalar_type()));
  STD_TORCH_CHECK(window >= 0, kOp, ": window must be at least 0, got ", window);
  const bool has_far_q = given_far_q.has_value(), keeps_keys = ring_keys.dim() == 4 && ring_keys.size(3) != 0;
  STD_TORCH_CHECK(
      given_far_k.has_value() == has_far_q && (!has_far_q || keeps_keys || window == 0), kOp,
      ": far_q and far_k must be given together, with a state that keeps exact keys");
  const Tensor &far_q = has_far_q ? *given_far_q : q, &far_k = has_far_q ? *given_far_k : k;
  const ScalarType dtype = q.scalar_type();
  check_tensor(kOp, "q", q, dtype, "(B, H, T, D)", {kAnySize, kAnySize, kAnySize, kAnySize});
  const int64_t batch = q.size(0), heads = q.size(1), length = q.size(2), head_dim = q.size(3);
  check_tensor(kOp, "k", k, dtype, "(B, Hkv, T, D)", {batch, kAnySize, length, head_dim});
  const int64_t kv_heads = k.size(1), reach = std::max<int64_t>(window - 1, 0);
  check_tensor(kOp, "v", v, dtype, "(B, Hkv, T, E)", {batch, kv_heads, length, kAnySize});
  check_tensor(kOp, "far_q", far_q, dtype, "(B, H, T, F)", {batch, heads, length, kAnySize});
  const int64_t value_dim = v.size(3), far_head_dim = far_q.size(3);
  check_tensor(kOp, "far_k", far_k, dtype, "(B, Hkv, T, F)", {batch, kv_heads, length, far_head_dim});
  check_tensor(kOp, "codebook", codebook, ScalarType::Float, "(Hkv, S, F)", {kv_heads, kAnySize, far_head_dim});
  const int64_t num_codes = codebook.size(1);
  check_attention_sizes(kOp, heads, kv_heads, head_dim, far_head_dim, value_dim, num_codes);
  OptionalTensor codes = given_codes;
  if (codes.has_value()) {
    check_tensor(kOp, "codes", *codes, ScalarType::Long, "(B, Hkv, T)", {batch, kv_heads, length});
  }
  if (bias.has_value()) {
    check_tensor(kOp, "bias", *bias, ScalarType::Float, "(H, W)", {heads, window});
  }
  if (key_padding_mask.has_value()) {
    check_tensor(kOp, "key_padding_mask", *key_padding_mask, ScalarType::Bool, "(B, T)", {batch, length});
  }
  check_state("far_sums", far_sums, ScalarType::Float, {batch, kv_heads, num_codes, value_dim});
  check_state("far_counts", far_counts, ScalarType::Long, {batch, kv_heads, num_codes});
  check_state("ring_codes", ring_codes, ScalarType::Long, {batch, kv_heads, reach});
  check_state("ring_keys", ring_keys, ScalarType::Float, {batch, kv_heads, reach, keeps_keys ? head_dim : 0});
  check_state("ring_values", ring_values, ScalarType::Float, {batch, kv_heads, reach, value_dim});
  check_state("lengths", lengths, ScalarType::Long, {batch});

  const Tensor out = torch::stable::new_empty(v, {batch, heads, length, value_dim}, q.scalar_type());
  if (batch == 0 || heads == 0 || length == 0) {
    return out;
  }
  // TokenByToken finds the codes along with the scores.
  if (!codes.has_value() && length >= kMinBlockTokens) {
    codes = vq_assign_cpu(far_k, codebook);
  }
  const Tensor table = codebook.stride(2) == 1 ? codebook : torch::stable::contiguous(codebook);
  OptionalTensor biases;
  if (bias.has_value() && window > 0) {
    biases = torch::stable::contiguous(*bias);
  }
  StepCall call{
      StepInput(q, *type),
      StepInput(k, *type),
      StepInput(v, *type),
      StepInput(far_q, *type),
      StepInput(far_k, *type),
      {out.mutable_data_ptr(), *type, value_dim},
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
      choice_of<Activation>(kOp, "activation", activation),
      keeps_keys && window > 0,
      has_far_q,
      batch,
      heads,
      kv_heads,
      heads / kv_heads,
      length,
      head_dim,
      far_head_dim,
      value_dim,
      num_codes,
      0,
      step::kernel_of_this_cpu(),
      block::kernel_of_this_cpu()};
  if (codes.has_value()) {
    call.codes = static_cast<const int64_t*>(codes->const_data_ptr());
    std::copy_n(
        std::initializer_list<int64_t>{codes->stride(0), codes->stride(1), codes->stride(2)}.begin(), 3,
        call.codes_strides);
  }
  if (biases.has_value()) {
    call.bias = static_cast<const float*>(biases->const_data_ptr());
  }
  if (key_padding_mask.has_value()) {
    call.mask = static_cast<const bool*>(key_padding_mask->const_data_ptr());
    call.mask_strides[0] = key_padding_mask->stride(0);
    call.mask_strides[1] = key_padding_mask->stride(1);
  }
  check_all_codes(call);
  call.max_ring = std::min(reach, *std::max_element(call.lengths, call.lengths + batch) + length);
  run(call);
  return out;
}

}  // namespace longvq
