// Attention over vector-quantised keys on the CPU, in linear time; meaning as in longvq_layers/ops/vq.py.
#pragma once

#include "../attention_operator.h"

namespace longvq {

// q, k, v, far_q and far_k in float32, bfloat16 or float16, all of one dtype; codebook and bias float32, codes int64;
// on the CPU, any strides. The output has the dtype of v, the normalizers are float32.
AttentionResult vq_attention_cpu(const AttentionInputs& inputs, const AttentionOptions& options);

// grad and out (B, H, L, E) in the dtype of v, normalizers (B, H, L, 2) float32. The gradient of the bias is float32,
// the others have the dtypes of their arguments.
AttentionGradientTensors vq_attention_backward_cpu(
    const Tensor& grad, const Tensor& out, const Tensor& normalizers, const AttentionInputs& inputs,
    const AttentionOptions& options);

}  // namespace longvq
