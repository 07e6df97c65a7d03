// Attention over vector-quantised keys, piece by piece: shapes and meaning as in longvq_layers/ops/vq_step.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace longvq {

// q (B, H, T, D), k (B, Hkv, T, D), v (B, Hkv, T, E) float32, bfloat16 or float16, of one type; codebook (Hkv, S, F)
// and bias (H, W) float32; codes (B, Hkv, T) int64, found here if not given; far_q (B, H, T, F) and far_k (B, Hkv, T,
// F) in the type of q, or none, then F = D; any strides. The state is contiguous and changes in place: far_sums (B,
// Hkv, S, E) float32, far_counts (B, Hkv, S) int64, ring_codes (B, Hkv, R) int64, ring_keys (B, Hkv, R, D or 0) and
// ring_values (B, Hkv, R, E) float32, lengths (B,) int64, with R = max(W - 1, 0). -> out (B, H, T, E) in the type of q.
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
