// The next tokens of causal attention over vector-quantised keys; meaning as in longvq_layers/ops/vq_step.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace longvq {

// q (B, H, T, D), k (B, Hkv, T, D), v (B, Hkv, T, E) in float32, bfloat16 or float16, all of one dtype; codebook (Hkv,
// S, F) and bias (H, W) float32; codes (B, Hkv, T) int64, by default those of the nearest codewords; far_q (B, H, T, F)
// and far_k (B, Hkv, T, F) in the dtype of q, without them F = D. Any strides. The state is contiguous and updated in
// place. With R = max(W - 1, 0): far_sums (B, Hkv, S, E) float32, far_counts (B, Hkv, S) int64, ring_codes (B, Hkv, R)
// int64, ring_keys (B, Hkv, R, D or 0) and ring_values (B, Hkv, R, E) float32, lengths (B,) int64. Returns the output
// (B, H, T, E) in the dtype of q.
torch::stable::Tensor vq_attention_step_cpu(
    const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
    const torch::stable::Tensor& codebook, const std::optional<torch::stable::Tensor>& codes,
    const std::optional<torch::stable::Tensor>& bias, const std::optional<torch::stable::Tensor>& key_padding_mask,
    const std::optional<torch::stable::Tensor>& far_q, const std::optional<torch::stable::Tensor>& far_k,
    const torch::stable::Tensor& far_sums, const torch::stable::Tensor& far_counts,
    const torch::stable::Tensor& ring_codes, const torch::stable::Tensor& ring_keys,
    const torch::stable::Tensor& ring_values, const torch::stable::Tensor& lengths, double scale, int64_t window,
    int64_t activation);

}  // namespace longvq
