// Where the tables of a channel lie, in global and in shared memory.
#pragma once

#include <type_traits>

#include "../common/tile.h"
#include "params.h"

namespace longvq::cuda {

// float16 becomes three terms like float32: states are sums, which may leave the range of float16.
template <typename Element>
using ScanOperand = std::conditional_t<std::is_same_v<Element, BFloat16>, OneBFloat16, ThreeBFloat16>;

template <int TERMS>
struct ScanLayout {
  using Inside = Tile<16, kScanSteps, TERMS>;           // K[column − row]; the other 16 rows of K are the same, shifted
  using Table = Tile<kScanSteps, kScanSteps, TERMS>;    // (steps, columns of a group) or transposed
  using Chunks = Tile<kScanChunks, kScanSteps, TERMS>;  // inputs

  static_assert(2 * kScanGroup == kScanSteps, "tables are square");
  static_assert(Inside::kPitch == kScanSteps + 8 && Table::kPitch == kScanSteps + 8, "see scan_table_size");

  LONGVQ_DEVICE static Inside inside(uint16_t* tables) { return {tables}; }
  // Into the state, and out of it.
  LONGVQ_DEVICE static Table in(uint16_t* tables, int group) {
    return {tables + (Inside::kBytes + 2 * group * Table::kBytes) / sizeof(uint16_t)};
  }
  LONGVQ_DEVICE static Table out(uint16_t* tables, int group) {
    return {tables + (Inside::kBytes + (2 * group + 1) * Table::kBytes) / sizeof(uint16_t)};
  }
  // For gradients of the parameters. 0 and 1 multiply inputs: powers of the decay, and powers times their exponents. 2
  // and 3 multiply gradients: the same, one step later.
  LONGVQ_DEVICE static Table of_gradients(uint16_t* tables, int group, int which) {
    return {tables + (4 * group + which) * (Table::kBytes / sizeof(uint16_t))};
  }
};

}  // namespace longvq::cuda
