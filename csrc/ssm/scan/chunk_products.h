// The matrix products of a chunk; each element of a matrix is a register of channels. For scan_kernel.cpp only.
#pragma once

#include "../../common/simd.h"
#include "chunk_tables.h"

namespace longvq {
namespace {

constexpr int kRows = kLanes == 16 ? 4 : 6;  // chunks that share a pass over a panel; kRows * kPanel accumulators

constexpr int kSegment = 3 * kRows;  // chunks that are processed together, a multiple of kRows
constexpr int kSegmentSteps = kSegment * kChunk;

template <int VALUE>
struct Constant {
  static constexpr int value = VALUE;
};

// Runs call(Constant<rows>, first chunk) for tiles of kRows chunks, then for each remaining chunk. The inputs of a tile
// stay in the L1 cache during the pass over the tables.
template <typename Call>
inline void for_tiles(int64_t chunks, const Call& call) {
  int64_t c = 0;
  for (; c + kRows <= chunks; c += kRows) {
    call(Constant<kRows>{}, c);
  }
  for (; c < chunks; ++c) {
    call(Constant<1>{}, c);
  }
}

// acc[r][j] += sum_k a[r * row_stride + k] * panel[k * panel_stride + j]
template <int ROWS>
inline void multiply(
    Floats (&acc)[ROWS][kPanel], const Floats* a, int64_t row_stride, const Floats* panel, int64_t panel_stride,
    int64_t depth) {
  for (int64_t k = 0; k < depth; ++k, panel += panel_stride) {
    for (int r = 0; r < ROWS; ++r) {
      Floats value = a[r * row_stride + k];
      keep(value);
      for (int j = 0; j < kPanel; ++j) {
        acc[r][j] += value * panel[j];
      }
    }
  }
}

// Stores element by element: a copy of the array would move the accumulators from registers to memory.
template <int ROWS>
inline void store_rows(const Floats (&acc)[ROWS][kPanel], Floats* out, int64_t row_stride) {
  for (int r = 0; r < ROWS; ++r) {
    for (int j = 0; j < kPanel; ++j) {
      out[r * row_stride + j] = acc[r][j];
    }
  }
}

// For ROWS chunks: added[c][column] is what the inputs of chunk c add to the state. Rows are padded_columns apart.
template <int ROWS>
inline void into_state(const ChunkTables& tables, const Floats* inputs, int64_t column, Floats* added) {
  Floats acc[ROWS][kPanel] = {};
  multiply<ROWS>(acc, inputs, kChunk, tables.into + column * kChunk, kPanel, kChunk);
  store_rows<ROWS>(acc, added + column, tables.padded_columns);
}

// Outputs t0 .. t0 + kPanel of ROWS chunks, from their entry states and their inputs up to these steps.
template <int ROWS>
inline void outputs(const ChunkTables& tables, const Floats* states, const Floats* inputs, int t0, Floats* out) {
  const int64_t padded = tables.padded_columns;
  Floats acc[ROWS][kPanel] = {};
  multiply<ROWS>(acc, states, padded, tables.out + t0 * padded, kPanel, tables.columns);
  // Input s has the factors K[t - s]: its panel starts at K[t0 - s].
  multiply<ROWS>(acc, inputs, kChunk, tables.kernel + t0, -1, t0);
  // Later inputs are left out instead of multiplied by zero, because they could be infinite.
  for (int r = 0; r < ROWS; ++r) {
    for (int s = 0; s < kPanel; ++s) {
      const Floats value = inputs[r * kChunk + t0 + s];
      for (int j = s; j < kPanel; ++j) {
        acc[r][j] += value * tables.kernel[j - s];
      }
    }
  }
  store_rows<ROWS>(acc, out + t0, kChunk);
}

// An unfinished chunk of `steps` steps changes the state like a full chunk that has the same inputs at its end.
inline void align_to_end(const Floats* inputs, int64_t steps, Floats* aligned) {
  for (int64_t t = 0; t < kChunk; ++t) {
    aligned[t] = t < kChunk - steps ? Floats{} : inputs[t - (kChunk - steps)];
  }
}

}  // namespace
}  // namespace longvq
