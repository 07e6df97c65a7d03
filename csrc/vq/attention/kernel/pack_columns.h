// Packs a matrix whose columns are contiguous in memory, such as keys and values, into panels. For
// attention_kernel.cpp.
#pragma once

#include "products.h"

namespace longvq {
namespace {

// One step of a transposition. Lanes of `a` whose index has the bit HALF change places with lanes of `b` whose index
// lacks this bit.
template <int HALF, std::size_t... I>
inline void swap_lanes(Floats& a, Floats& b, std::index_sequence<I...>) {
  const Floats old = a;
  a = lanes_of(old, b, std::index_sequence<((I & HALF) != 0 ? kLanes + I - HALF : I)...>{});
  b = lanes_of(old, b, std::index_sequence<((I & HALF) != 0 ? kLanes + I : I + HALF)...>{});
}

// Transposes a square of numbers, one register per row: first exchanges halves, then quarters, and so on.
template <int HALF>
inline void transpose(Floats (&square)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    if ((i & HALF) == 0) {
      swap_lanes<HALF>(square[i], square[i + HALF], std::make_index_sequence<kLanes>{});
    }
  }
  if constexpr (HALF > 1) {
    transpose<HALF / 2>(square);
  }
}

// rows[c] becomes column c of the panels (depth, columns).
inline void pack_columns(const float* const* rows, int64_t columns, int64_t depth, float* panels) {
  for (int64_t first = 0; first < columns; first += kPanel) {
    const int64_t width = columns - first < kPanel ? columns - first : kPanel;
    for (int64_t c = 0; c < width; c += kLanes) {
      const float* const* from = rows + first + c;
      float* out = panels + first * depth + c;
      int64_t d = 0;
      for (; d + kLanes <= depth; d += kLanes) {
        Floats square[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          square[i] = load<Floats>(from[i] + d);
        }
        transpose<kHalf>(square);
        for (int i = 0; i < kLanes; ++i) {
          store(out + (d + i) * width, square[i]);
        }
      }
      for (; d < depth; ++d) {
        for (int i = 0; i < kLanes; ++i) {
          out[d * width + i] = from[i][d];
        }
      }
    }
  }
}

}  // namespace
}  // namespace longvq
