// Attention over vector-quantised keys, in linear time: shapes and meaning as in longvq_layers/ops/vq.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace longvq {

// q (B, H, L, D), k (B, Hkv, L, D), v (B, Hkv, L, E) in float32, bfloat16 or float16, codebook (Hkv, S, D) and bias
// float32, codes (B, Hkv, L) int64, on the CPU, any strides. cu_seqlens (N + 1,) int32, B = 1: the row holds N
// documents, each attended by itself. near_dim > 0: its first columns of q and k are for pairs inside the window, the
// others for pairs outside; the codebook has zeros in the first. -> out (B, H, L, E) in the dtype of v and, float32,
// (B, H, L, 2) of softmax: what was taken from the scores before exp, and the sum that was divided by.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> vq_attention_cpu(
    const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
    const torch::stable::Tensor& codebook, const torch::stable::Tensor& codes,
    const std::optional<torch::stable::Tensor>& bias, const std::optional<torch::stable::Tensor>& key_padding_mask,
    const std::optional<torch::stable::Tensor>& cu_seqlens, double scale, bool causal, int64_t window,
    const std::string& activation, const std::string& local_keys, const std::string& key_grad, int64_t near_dim);

// grad and out (B, H, L, E), normalizers (B, H, L, 2): as they come out of the forward. -> gradients of q, k, v in
// their dtype and of the bias, float32; without a bias of no element.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
vq_attention_backward_cpu(
    const torch::stable::Tensor& grad, const torch::stable::Tensor& out, const torch::stable::Tensor& normalizers,
    const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
    const torch::stable::Tensor& codebook, const torch::stable::Tensor& codes,
    const std::optional<torch::stable::Tensor>& bias, const std::optional<torch::stable::Tensor>& key_padding_mask,
    const std::optional<torch::stable::Tensor>& cu_seqlens, double scale, bool causal, int64_t window,
    const std::string& activation, const std::string& local_keys, const std::string& key_grad, int64_t near_dim);

}  // namespace longvq
