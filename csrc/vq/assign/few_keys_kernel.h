// The interface between few_keys.cpp and the kernel in few_keys_kernel.cpp, which is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace longvq {

// The number of keys per head up to which this kernel is faster; measured, see docs/kernels.md.
constexpr int64_t kFewKeys = 16;

// A few keys of one head against all its codes.
struct AssignFew {
  int64_t rows;           // keys, at most kFewKeys
  int64_t codes;          // S
  int64_t head_dim;       // D, padded with zeros to a multiple of AssignFewKernel::lanes
  const float* keys;      // (rows, head_dim)
  const float* codebook;  // (codes, head_dim), rows code_stride apart
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
