// The diagonal recurrence x_t = exp(log_decay) x_{t-1} + u_t, y_t = Re sum_n weight_n x_{t,n} + skip u_t, and its
// gradients. Shapes and meaning as in longvq_layers/ops/ssm.py; u is float32, bfloat16 or float16, everything else
// float32 or complex64; on the CPU, any strides.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace longvq {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> ssm_scan_cpu(
    const torch::stable::Tensor& u, const torch::stable::Tensor& log_decay, const torch::stable::Tensor& weight,
    const std::optional<torch::stable::Tensor>& skip, const std::optional<torch::stable::Tensor>& initial_state,
    const std::optional<torch::stable::Tensor>& key_padding_mask,
    const std::optional<torch::stable::Tensor>& cu_seqlens, bool reverse);

// Gradients of u, log_decay, weight, skip and initial_state. The gradient of an absent argument is an empty tensor.
// Without need_inputs the gradients of u and initial_state are empty too, without need_parameters the gradients of
// log_decay, weight and skip.
std::tuple<
    torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
ssm_scan_backward_cpu(
    const torch::stable::Tensor& grad_y, const torch::stable::Tensor& grad_state, const torch::stable::Tensor& u,
    const torch::stable::Tensor& log_decay, const torch::stable::Tensor& weight,
    const std::optional<torch::stable::Tensor>& skip, const std::optional<torch::stable::Tensor>& initial_state,
    const std::optional<torch::stable::Tensor>& key_padding_mask,
    const std::optional<torch::stable::Tensor>& cu_seqlens, bool reverse, bool need_inputs, bool need_parameters);

}  // namespace longvq
