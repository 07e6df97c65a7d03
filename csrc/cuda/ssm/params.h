// The launchers of the state space scan, and the structs that they take; see common/status.h.
//
// Shapes: B batch, L length, H channels, N modes.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"
#include "../common/sequences.h"

namespace longvq::cuda {

// A chunk is kScanSteps steps. A warp works on kScanChunks chunks of a channel at a time, a tile.
constexpr int64_t kScanSteps = 32, kScanChunks = 32;
constexpr int64_t kScanTile = kScanSteps * kScanChunks;  // steps
constexpr int64_t kScanGroup = 16;                       // complex modes that are computed together
constexpr int64_t kScanMaxModes = 32;                    // d_state = 64; shared memory holds no larger tables

constexpr int64_t padded_modes(int64_t modes) {
  return (modes + kScanGroup - 1) / kScanGroup * kScanGroup;
}

// The parameters of the scan.
struct ScanModes {
  int64_t channels, modes;
  bool complex_modes;
  const float* log_decay;  // (H, N); complex numbers as pairs
  const float* weight;     // (H, N); complex numbers as pairs
  const float* skip;       // (H,) or null
};

enum class ScanUse : int32_t { kScan, kAdjoint, kGradients };

// Makes the tables of the scan, or of its adjoint, or of the gradients of its parameters.
struct ScanTables {
  ScanModes modes;
  ElementType type;  // kBFloat16: one term a number; others: three bfloat16 terms
  ScanUse use;
  uint16_t* tables;  // (H, scan_table_size), of gradients (H, scan_gradient_table_size)
  float* decays;     // (H, padded modes, kScanPowers) complex numbers
};
constexpr int64_t kScanPowers = 5;  // of the decay: 1, T, 4 T, 8 T, 16 T with T = kScanSteps

// The 16-bit numbers in the tables of a channel: K, and for each group of modes one table into the state and one out
// of it.
constexpr int64_t scan_table_size(int64_t modes, int64_t terms) {
  return terms * (kScanSteps + 8) * (16 + padded_modes(modes) / kScanGroup * 2 * kScanSteps);
}

// The same for gradients of the parameters: four tables for each group of modes.
constexpr int64_t scan_gradient_table_size(int64_t modes, int64_t terms) {
  return terms * (kScanSteps + 8) * (padded_modes(modes) / kScanGroup * 4 * kScanSteps);
}

// The strides of a tensor (B, L, H).
struct ScanStrides {
  int64_t batch, length, channel;
};

struct Scan : Sequences {
  ScanModes modes;
  ElementType type;  // of u and y
  bool reverse, adjoint;
  const void* u;  // (B, L, H)
  ScanStrides u_strides;
  void* y;  // (B, L, H), contiguous
  PaddingMask mask;
  const float* initial_state;  // (sequences, H, N), complex numbers as pairs, or null
  float* final_state;          // (sequences, H, N), complex numbers as pairs
  const uint16_t* tables;
  const float* decays;
  // Sequences are cut into segments, which run at the same time.
  int64_t segment_length;  // steps, a multiple of kScanTile
  float* segment_states;   // (B, H, segments, N) complex numbers; null if no sequence has two segments

  constexpr int64_t num_segments() const { return num_pieces(segment_length); }  // in one row of the tensors
};

// Gradients of the parameters, summed within each segment.
struct ScanGradients {
  Scan scan;         // without y and final_state
  const void* grad;  // of y, (B, L, H)
  ScanStrides grad_strides;
  const float* grad_state;  // (sequences, H, N)
  float* segment_states;    // (B, H, segments, N, 2) complex numbers; null if no sequence has two segments
  double* dmodes;           // (B, segments, H, N, 4), zero before the call: of weight and log_decay, real and imaginary
  double* dskip;            // (B, segments, H), zero before the call
};

// Sums the gradients over the segments. Complex gradients are conjugated, as PyTorch defines them.
struct SumScanGradients {
  ScanModes modes;
  int64_t segments;  // in all rows of the batch
  const double *dmodes, *dskip;
  float *dweight, *dlog_decay;  // (H, N)
  float* dskip_sum;             // (H,) or null
};

extern "C" {
int longvq_cuda_scan_tables(const ScanTables* problem, void* stream);
int longvq_cuda_scan(const Scan* problem, void* stream);
int longvq_cuda_scan_gradients(const ScanGradients* problem, void* stream);
int longvq_cuda_sum_scan_gradients(const SumScanGradients* problem, void* stream);
}

}  // namespace longvq::cuda
