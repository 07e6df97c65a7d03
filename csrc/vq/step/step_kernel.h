// What attention_step_head.h and the kernels in attention_step_kernel.cpp, compiled once per instruction set, agree on.
//
// One token costs a pass over the codes and a pass over the sums of their values, as they lie in memory: packing either
// would take longer than reading it.
#pragma once

#include <cstdint>

namespace longvq {

struct AttentionStepKernel {
  int64_t lanes;  // columns and vectors are padded to multiples of this

  // out[v * out_stride + r] = vectors[v] . rows[r], and squares[r] = |rows[r]|^2 unless nullptr.
  // rows: (count, depth), row_stride apart; vectors: (vector_count, depth), each padded with zeros to whole registers.
  // Writes whole registers, zeros behind the last row. Equal rows get equal results.
  void (*products)(
      const float* rows, int64_t row_stride, int64_t count, int64_t depth, const float* vectors, int64_t vector_count,
      float* out, int64_t out_stride, float* squares);

  // Scores of `far` codes, of which counts[c] >= 0 keys each, and of `near` keys become weights, up to a common factor;
  // returns the sum of those of all keys. Both numbers padded: no key has count 0 or score -infinity.
  float (*softmax)(float* scores, const float* counts, int64_t far, int64_t near);

  // out (width,) = sum over i < count of weights[i] * rows[i]
  void (*weighted_sum)(const float* const* rows, const float* weights, int64_t count, int64_t width, float* out);
};

extern const AttentionStepKernel attention_step_kernel_default;
extern const AttentionStepKernel attention_step_kernel_avx2;
extern const AttentionStepKernel attention_step_kernel_avx512;

}  // namespace longvq
