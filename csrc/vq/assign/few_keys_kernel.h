// What the host code in assign_few_cpu.cpp and the kernel in assign_few_kernel.cpp, compiled once per instruction set,
// agree on.
#pragma once

#include <cstdint>

namespace longvq {

// Rows of a head up to which this is the faster way; measured, see docs/kernels.md.
constexpr int64_t kFewKeys = 16;

// A few keys of one head against all its codes.
struct AssignFew {
  int64_t rows;           // keys, at most kFewKeys
  int64_t codes;          // S
  int64_t depth;          // D, a multiple of AssignFewKernel::lanes: the rest is zeros
  const float* keys;      // (rows, depth)
  const float* codebook;  // (codes, depth), rows code_stride apart
  int64_t code_stride;
  int32_t* out;  // (rows,)
};

struct AssignFewKernel {
  int64_t lanes;
  void (*assign)(const AssignFew&);
};

extern const AssignFewKernel assign_few_kernel_default;
extern const AssignFewKernel assign_few_kernel_avx2;
extern const AssignFewKernel assign_few_kernel_avx512;

}  // namespace longvq
