// One step of the recurrence of scan.h, for generation.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace longvq {

// u (B, H) float32, bfloat16 or float16; decay = exp(log_decay) and weight (H, N), state (B, H, N) float32 or
// complex64; skip (H,) float32. Returns y (B, H) in the dtype of u and the new state (B, H, N).
std::tuple<torch::stable::Tensor, torch::stable::Tensor> ssm_step_cpu(
    const torch::stable::Tensor& u, const torch::stable::Tensor& decay, const torch::stable::Tensor& weight,
    const std::optional<torch::stable::Tensor>& skip, const torch::stable::Tensor& state);

}  // namespace longvq
