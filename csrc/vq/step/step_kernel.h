// The interface between token_by_token.h and the kernels in step_kernel.cpp, which are compiled once per instruction
// set.
//
// A token takes one pass over the codewords and one over the sums of values. Nothing is packed: packing would take
// longer than the two passes.
#pragma once

#include <cstdint>

namespace longvq {

struct AttentionStepKernel {
  int64_t lanes;  // columns and vectors are padded to multiples of this

  // out[v * out_stride + r] = vectors[v] . rows[r], and squares[r] = |rows[r]|^2 unless nullptr.
  // rows: (count, dim), row_stride apart; vectors: (vector_count, dim), each padded with zeros to whole registers.
  // Writes whole registers, with zeros after the last row. Equal rows give equal results.
  void (*products)(
      const float* rows, int64_t row_stride, int64_t count, int64_t dim, const float* vectors, int64_t vector_count,
      float* out, int64_t out_stride, float* squares);

  // Replaces scores by weights, up to a common factor. The scores are those of `far` codes, where code c stands for
  // counts[c] keys, then those of `near` keys. Returns the sum of the weights of all keys. Padding has count 0 (codes)
  // or score -infinity (near keys).
  float (*softmax)(float* scores, const float* counts, int64_t far, int64_t near);

  // out (columns,) = sum over i < count of weights[i] * rows[i]
  void (*weighted_sum)(const float* const* rows, const float* weights, int64_t count, int64_t columns, float* out);
};

extern const AttentionStepKernel attention_step_kernel_default;
extern const AttentionStepKernel attention_step_kernel_avx2;
extern const AttentionStepKernel attention_step_kernel_avx512;

}  // namespace longvq
