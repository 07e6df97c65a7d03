// The nearest codeword of each key: codes[b, h, l] = argmin_s ||k[b, h, l] - C[h, s]||^2. If several codewords are
// equally near, it is the lowest s.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace longvq {

// k (B, H, L, D) and codebook (H, S, D) on the CPU, float32, bfloat16 or float16, any strides. Returns (B, H, L) int64.
torch::stable::Tensor vq_assign_cpu(const torch::stable::Tensor& k, const torch::stable::Tensor& codebook);

}  // namespace longvq
