// The signatures of the attention operators, written once: the arguments of the schema become AttentionInputs and
// AttentionOptions, which the operators of every device take.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

#include "attention_options.h"

namespace longvq {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// As in longvq_layers/ops/_attention_inputs.py.
struct AttentionInputs {
  const Tensor& q;                         // (B, H, L, D)
  const Tensor& k;                         // (B, Hkv, L, D)
  const Tensor& v;                         // (B, Hkv, L, E)
  const Tensor& codebook;                  // (Hkv, S, F), F = D without far_q
  const Tensor& codes;                     // (B, Hkv, L)
  const OptionalTensor& bias;              // (H, W) if causal, else (H, 2 W - 1)
  const OptionalTensor& key_padding_mask;  // (B, L)
  const OptionalTensor& cu_seqlens;        // (N + 1,)
  const OptionalTensor& far_q;             // (B, H, L, F)
  const OptionalTensor& far_k;             // (B, Hkv, L, F)
};

// The output (B, H, L, E), and for the backward of softmax (B, H, L, 2): the number subtracted from the scores before
// exp, and the sum of the weights.
using AttentionResult = std::tuple<Tensor, Tensor>;

// Gradients of q, k, v, bias, far_q and far_k; an empty tensor for an argument that is absent.
using AttentionGradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The schema has integers for the choices, since string arguments of stable-ABI operators leak memory on every call.
template <typename Choice>
Choice choice_of(const char* op, const char* name, int64_t value) {
  STD_TORCH_CHECK(value == 0 || value == 1, op, ": ", name, " must be 0 or 1, got ", value);
  return static_cast<Choice>(value);
}

inline AttentionOptions attention_options(
    double scale, bool causal, int64_t window, int64_t activation, int64_t local_keys, int64_t key_grad) {
  constexpr const char* kOp = "vq_attention";
  STD_TORCH_CHECK(window >= 0, kOp, ": window must be at least 0, got ", window);
  return {
      static_cast<float>(scale),
      causal,
      window,
      choice_of<Activation>(kOp, "activation", activation),
      choice_of<LocalKeys>(kOp, "local_keys", local_keys),
      choice_of<KeyGrad>(kOp, "key_grad", key_grad)};
}

// Checks that D, F, E and S are at least 1, and that all key-value heads have equally many query heads.
inline void check_attention_sizes(
    const char* op, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t far_head_dim, int64_t value_dim,
    int64_t num_codes) {
  STD_TORCH_CHECK(
      kv_heads >= 1 && heads % kv_heads == 0, op, ": the heads of q must be a multiple of those of k, got ", heads,
      " and ", kv_heads);
  STD_TORCH_CHECK(
      head_dim >= 1 && far_head_dim >= 1 && value_dim >= 1 && num_codes >= 1, op,
      ": D, F, E and S must be at least 1, got ", head_dim, ", ", far_head_dim, ", ", value_dim, " and ", num_codes);
}

// Checks that codes are in [0, num_codes). The kernels use codes as addresses.
inline void check_codes(const char* op, const int64_t* codes, int64_t count, int64_t stride, int64_t num_codes) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t code = codes[i * stride];
    STD_TORCH_CHECK(code >= 0 && code < num_codes, op, ": codes must lie in [0, S) = [0, ", num_codes, "), got ", code);
  }
}

// The operator vq_attention around FORWARD(inputs, options).
template <auto FORWARD>
AttentionResult vq_attention_operator(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& codebook, const Tensor& codes,
    const OptionalTensor& bias, const OptionalTensor& key_padding_mask, const OptionalTensor& cu_seqlens,
    const OptionalTensor& far_q, const OptionalTensor& far_k, double scale, bool causal, int64_t window,
    int64_t activation, int64_t local_keys, int64_t key_grad) {
  return FORWARD(
      AttentionInputs{q, k, v, codebook, codes, bias, key_padding_mask, cu_seqlens, far_q, far_k},
      attention_options(scale, causal, window, activation, local_keys, key_grad));
}

// The operator vq_attention_backward around BACKWARD(grad, out, normalizers, inputs, options).
template <auto BACKWARD>
AttentionGradientTensors vq_attention_backward_operator(
    const Tensor& grad, const Tensor& out, const Tensor& normalizers, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& codebook, const Tensor& codes, const OptionalTensor& bias, const OptionalTensor& key_padding_mask,
    const OptionalTensor& cu_seqlens, const OptionalTensor& far_q, const OptionalTensor& far_k, double scale,
    bool causal, int64_t window, int64_t activation, int64_t local_keys, int64_t key_grad) {
  return BACKWARD(
      grad, out, normalizers,
      AttentionInputs{q, k, v, codebook, codes, bias, key_padding_mask, cu_seqlens, far_q, far_k},
      attention_options(scale, causal, window, activation, local_keys, key_grad));
}

}  // namespace longvq
