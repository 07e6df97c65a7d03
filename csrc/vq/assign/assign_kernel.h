// The interface between assign.cpp and the kernel in assign_kernel.cpp, which is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace longvq {

// A block of keys against all codes of one head. Pointers are aligned to 64 bytes, sizes count elements.
struct AssignBlock {
  int64_t rows;         // keys in this block
  int64_t head_dim;     // D
  int64_t codes;        // S rounded up to a multiple of AssignKernel::lanes
  const float* keys;    // (rows rounded up to AssignKernel::row_step, D)
  const float* panels;  // (codes / panel, D, panel); the last panel is narrower if codes is not a multiple of panel
  const float* bias;    // (codes,)  -||C_s||^2 / 2, -infinity in the padding
  float* best;          // scratch (rows rounded up, lanes): best score so far of each SIMD lane
  int32_t* best_code;   // scratch, same shape: the code that had it
  int32_t* out;         // (rows,)
};

struct AssignKernel {
  int64_t lanes;     // codes per SIMD register
  int64_t panel;     // codes per panel, a multiple of lanes
  int64_t row_step;  // keys that share one pass over a panel
  void (*assign)(const AssignBlock&);
};

extern const AssignKernel assign_kernel_default;
extern const AssignKernel assign_kernel_avx2;
extern const AssignKernel assign_kernel_avx512;

}  // namespace longvq
