// The operators of longvq_layers/ops/_schema.py on CUDA tensors; arguments and results as there.
#pragma once

#include <string>
#include <tuple>

#include "tensors.h"

namespace longvq::cuda {

Tensor vq_assign(const Tensor& k, const Tensor& codebook);

std::tuple<Tensor, Tensor> vq_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& codebook, const Tensor& codes,
    const OptionalTensor& bias, const OptionalTensor& key_padding_mask, const OptionalTensor& cu_seqlens, double scale,
    bool causal, int64_t window, const std::string& activation, const std::string& local_keys,
    const std::string& key_grad, int64_t near_dim);

std::tuple<Tensor, Tensor, Tensor, Tensor> vq_attention_backward(
    const Tensor& grad, const Tensor& out, const Tensor& normalizers, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& codebook, const Tensor& codes, const OptionalTensor& bias, const OptionalTensor& key_padding_mask,
    const OptionalTensor& cu_seqlens, double scale, bool causal, int64_t window, const std::string& activation,
    const std::string& local_keys, const std::string& key_grad, int64_t near_dim);

std::tuple<Tensor, Tensor> ssm_scan(
    const Tensor& u, const Tensor& log_decay, const Tensor& weight, const OptionalTensor& skip,
    const OptionalTensor& initial_state, const OptionalTensor& key_padding_mask, const OptionalTensor& cu_seqlens,
    bool reverse);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ssm_scan_backward(
    const Tensor& grad_y, const Tensor& grad_state, const Tensor& u, const Tensor& log_decay, const Tensor& weight,
    const OptionalTensor& skip, const OptionalTensor& initial_state, const OptionalTensor& key_padding_mask,
    const OptionalTensor& cu_seqlens, bool reverse, bool need_inputs, bool need_parameters);

}  // namespace longvq::cuda
