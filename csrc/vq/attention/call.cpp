#include "call.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "../../common/check_tensor.h"
#include "../../common/cpu_capability.h"
#include "../../common/tensor_dtype.h"

namespace longvq {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* kOp = "vq_attention";

LONGVQ_DEFINE_KERNEL_OF_THIS_CPU(AttentionKernel, attention_kernel)

ElementType type_of(const Tensor& q) {
  const std::optional<ElementType> type = element_type(q);
  STD_TORCH_CHECK(
      type.has_value(), kOp, ": q must be float32, bfloat16 or float16 for the compiled CPU kernel, got another dtype");
  return *type;
}

}  // namespace

AttentionCall::AttentionCall(const AttentionInputs& in, const AttentionOptions& options)
    : q(in.q), k(in.k), v(in.v), codebook(in.codebook), codes(in.codes), far_q(in.far_q ? *in.far_q : in.q),
      bias(in.bias), mask(in.key_padding_mask), type(type_of(in.q)), scale(options.scale), causal(options.causal),
      window(options.window), activation(options.activation), uses_exact_keys(options.uses_exact_keys()),
      shares_gradients(options.key_grad == KeyGrad::kCluster), has_far_q(in.far_q.has_value()),
      kernel(kernel_of_this_cpu()) {
  STD_TORCH_CHECK(
      in.far_k.has_value() == has_far_q && (!has_far_q || options.local_keys == LocalKeys::kExact), kOp,
      ": far_q and far_k must be given together, with exact local_keys");
  const Tensor& far_k = has_far_q ? *in.far_k : k;
  const ScalarType dtype = q.scalar_type();
  check_tensor(kOp, "q", q, dtype, "(B, H, L, D)", {kAnySize, kAnySize, kAnySize, kAnySize});
  check_tensor(kOp, "k", k, dtype, "(B, Hkv, L, D)", {q.size(0), kAnySize, q.size(2), q.size(3)});
  batch = q.size(0), heads = q.size(1), length = q.size(2), head_dim = q.size(3), kv_heads = k.size(1);
  check_tensor(kOp, "v", v, dtype, "(B, Hkv, L, E)", {batch, kv_heads, length, kAnySize});
  check_tensor(kOp, "far_q", far_q, dtype, "(B, H, L, F)", {batch, heads, length, kAnySize});
  value_dim = v.size(3), far_head_dim = far_q.size(3);
  check_tensor(kOp, "far_k", far_k, dtype, "(B, Hkv, L, F)", {batch, kv_heads, length, far_head_dim});
  check_tensor(kOp, "codebook", codebook, ScalarType::Float, "(Hkv, S, F)", {kv_heads, kAnySize, far_head_dim});
  num_codes = codebook.size(1);
  check_attention_sizes(kOp, heads, kv_heads, head_dim, far_head_dim, value_dim, num_codes);
  check_tensor(kOp, "codes", codes, ScalarType::Long, "(B, Hkv, L)", {batch, kv_heads, length});
  if (bias.has_value()) {
    const int64_t columns = window == 0 ? kAnySize : causal ? window : 2 * window - 1;
    check_tensor(kOp, "bias", *bias, ScalarType::Float, causal ? "(H, W)" : "(H, 2 W - 1)", {heads, columns});
  }
  if (mask.has_value()) {
    check_tensor(kOp, "key_padding_mask", *mask, ScalarType::Bool, "(B, L)", {batch, length});
  }
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t head = 0; head < kv_heads; ++head) {
      const auto* codes_of_head =
          static_cast<const int64_t*>(codes.const_data_ptr()) + row * codes.stride(0) + head * codes.stride(1);
      check_codes(kOp, codes_of_head, length, codes.stride(2), num_codes);
    }
  }
  documents = documents_of(kOp, batch, length, in.cu_seqlens);
  window = std::min(window, length);  // a wider window has no more pairs
  group = heads / kv_heads;
  reach = std::max<int64_t>(window - 1, 0);
  far_columns = round_up(num_codes, kernel.lanes);
  value_columns = round_up(value_dim, kernel.lanes);
  head_columns = round_up(head_dim, kernel.lanes);
  far_head_columns = round_up(far_head_dim, kernel.lanes);
}

Keys::Keys(const AttentionCall& call, const Document& document, int64_t head)
    : k(call.matrix_of(call.k, document, head)), v(call.matrix_of(call.v, document, head)),
      codebook(codebook_of(call, head)),
      codes(
          static_cast<const int64_t*>(call.codes.const_data_ptr()) + document.row * call.codes.stride(0) +
          head * call.codes.stride(1) + document.start * call.codes.stride(2)),
      code_stride(call.codes.stride(2)), masked(nullptr), mask_stride(0) {
  if (call.mask.has_value()) {
    mask_stride = call.mask->stride(1);
    masked = static_cast<const bool*>(call.mask->const_data_ptr()) + document.row * call.mask->stride(0) +
             document.start * mask_stride;
  }
}

Matrix codebook_of(const AttentionCall& call, int64_t head) {
  const float* data = static_cast<const float*>(call.codebook.const_data_ptr()) + head * call.codebook.stride(0);
  return {
      reinterpret_cast<const char*>(data), call.codebook.stride(1), call.codebook.stride(2), call.far_head_dim,
      ElementType::kFloat};
}

int64_t bias_column(const AttentionCall& call, int64_t i) {
  // A bidirectional window that is wider than the sequence uses the middle columns only.
  return call.causal ? call.window - 1 - i : i + (call.bias->size(1) + 1) / 2 - call.window;
}

std::vector<float> bias_of(const AttentionCall& call, int64_t head) {
  std::vector<float> values;
  if (call.bias.has_value() && call.window > 0) {
    values.assign(2 * call.window - 1, 0.0f);
    const float* data = static_cast<const float*>(call.bias->const_data_ptr()) + head * call.bias->stride(0);
    for (int64_t i = 0; i < call.bias_columns(); ++i) {
      values[i] = data[bias_column(call, i) * call.bias->stride(1)];
    }
  }
  return values;
}

std::vector<float> score_factors_of(const AttentionCall& call, const Document& document, const Keys& keys) {
  std::vector<float> score_factors;
  if (call.activation == Activation::kLaplace) {
    int64_t count = 0;
    for (int64_t i = 0; i < document.length; ++i) {
      count += !keys.ignored(i);
      score_factors.push_back(1.0f / static_cast<float>(std::max<int64_t>(count, 1)));
    }
    if (!call.causal && !score_factors.empty()) {
      std::fill(score_factors.begin(), score_factors.end(), score_factors.back());
    }
  }
  return score_factors;
}

}  // namespace longvq
