// The interface between scan.cpp and the kernels in scan_kernel.cpp, which are compiled once per instruction set.
// A unit of work is a line of some rows: ScanKernel::line neighbouring channels, of which the last line may have fewer.
#pragma once

#include <cstdint>

#include "../../common/convert.h"

namespace longvq {

// One sequence of the channels of a line, in the order of the recurrence. Strides are in elements and may be negative.
struct Series {
  void* data;  // first step, first channel
  int64_t step_stride, channel_stride;
  ElementType type;
};

// A matrix (channels, modes) of a line: float32, or pairs of real and imaginary part. Strides are in floats.
struct ModeMatrix {
  float* data;  // nullptr: zero as an input, not computed as an output
  int64_t channel_stride, mode_stride;
};

struct ScanModel {
  int64_t longest;   // steps of the longest row
  int64_t channels;  // of this line, 1 .. ScanKernel::line
  int64_t modes;     // N
  bool complex_modes;
  ModeMatrix log_decay, weight;
  const float* skip;  // nullptr: no skip
  int64_t skip_stride;
};

struct ScanRow {
  int64_t length;  // steps
  Series in, out;
  const bool* mask;  // true: the input counts as 0 and the output is 0; nullptr: no mask
  int64_t mask_stride;
  ModeMatrix initial_state, final_state;
};

struct ScanGradientRow {
  int64_t length;
  Series u, grad_y;
  const bool* mask;
  int64_t mask_stride;
  ModeMatrix initial_state, grad_state;
};

// Sums over rows. A complex mode has two columns, its real and its imaginary part.
struct ScanGradients {
  double* log_decay;  // (columns, line)
  double* weight;     // (columns, line)
  double* skip;       // (line,)
};

struct ScanKernel {
  int64_t line;                                                 // channels
  int64_t (*scratch_bytes)(int64_t modes, bool complex_modes);  // scratch memory of a thread, aligned to 64 bytes
  // The recurrence or, with rows in the opposite order, its adjoint, which maps dL/dy to dL/du and dL/d(last state) to
  // dL/d(initial state).
  void (*scan)(const ScanModel&, bool adjoint, const ScanRow* rows, int64_t count, void* scratch);
  void (*gradients)(
      const ScanModel&, const ScanGradientRow* rows, int64_t count, const ScanGradients& sums, void* scratch);
};

extern const ScanKernel scan_kernel_default;
extern const ScanKernel scan_kernel_avx2;
extern const ScanKernel scan_kernel_avx512;

}  // namespace longvq
