// The operators of longvq_layers/ops/_schema.py on CUDA tensors, with the same arguments and results.
#pragma once

#include <tuple>

#include "../vq/attention_operator.h"
#include "tensors.h"

namespace longvq::cuda {

Tensor vq_assign(const Tensor& k, const Tensor& codebook);

AttentionResult vq_attention(const AttentionInputs& inputs, const AttentionOptions& options);

AttentionGradientTensors vq_attention_backward(
    const Tensor& grad, const Tensor& out, const Tensor& normalizers, const AttentionInputs& inputs,
    const AttentionOptions& options);

std::tuple<Tensor, Tensor> ssm_scan(
    const Tensor& u, const Tensor& log_decay, const Tensor& weight, const OptionalTensor& skip,
    const OptionalTensor& initial_state, const OptionalTensor& key_padding_mask, const OptionalTensor& cu_seqlens,
    bool reverse);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ssm_scan_backward(
    const Tensor& grad_y, const Tensor& grad_state, const Tensor& u, const Tensor& log_decay, const Tensor& weight,
    const OptionalTensor& skip, const OptionalTensor& initial_state, const OptionalTensor& key_padding_mask,
    const OptionalTensor& cu_seqlens, bool reverse, bool need_inputs, bool need_parameters);

}  // namespace longvq::cuda
