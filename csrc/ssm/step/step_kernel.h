// What the host code in step_cpu.cpp and the kernels in step_kernel.cpp, compiled once per instruction set, agree on.
#pragma once

#include <cstdint>

namespace longvq {

// One step of one channel: new = decay * state + u, returns Re sum weight * new. Contiguous; float32, or pairs re, im.
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
