// The interface between step.cpp and the kernels in step_kernel.cpp, which are compiled once per instruction set.
#pragma once

#include <cstdint>

namespace longvq {

// One step of one channel: new_state = decay * state + u. Returns Re sum weight * new_state. Arrays are contiguous:
// float32, or pairs of real and imaginary part.
struct StepKernel {
  float (*complex_modes)(
      const float* decay, const float* weight, const float* state, float u, int64_t modes, float* new_state);
  float (*real_modes)(
      const float* decay, const float* weight, const float* state, float u, int64_t modes, float* new_state);
};

extern const StepKernel step_kernel_default;
extern const StepKernel step_kernel_avx2;
extern const StepKernel step_kernel_avx512;

}  // namespace longvq
