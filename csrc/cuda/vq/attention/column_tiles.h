// The columns of the score matrix that a block of queries visits, in tiles: codes, which stand for the keys of the far
// field, then single keys near the block, outside and inside the window.
#pragma once

#include "../../common/device.h"
#include "../params.h"

namespace longvq::cuda {

struct ColumnRange {
  // kOutside, kInside: keys; only their pairs outside, or inside, the window count. kBoth: keys; all their pairs count,
  // because codewords replace keys inside the window too.
  enum Kind { kCodes, kOutside, kInside, kBoth };

  Kind kind;
  int first, last;  // codes or keys first .. last, `last` excluded
};

// The four ranges of columns for queries first .. last, `last` excluded: codes, keys outside the window before it, keys
// outside the window after it, and keys inside the window. If keys are quantised, the last range has all near keys and
// the two ranges outside are empty. The ranges stay in registers during the products, so they are 32-bit numbers.
struct ColumnTiles {
  static constexpr int kRanges = 4;

  int begin[kRanges], end[kRanges];
  bool exact;

  LONGVQ_DEVICE ColumnTiles(const Attention& p, int first, int last, int sequence_length) {
    const int window = static_cast<int>(p.options.window), reach = max(window, 1);
    const int block = first / static_cast<int>(kFarBlock) * static_cast<int>(kFarBlock);
    // Keys near_begin .. near_end are not in the far field of the block.
    const int near_begin = max(block - reach + 1, 0);
    const int near_end =
        p.options.causal ? last : min(block + static_cast<int>(kFarBlock) - 1 + reach, sequence_length);
    exact = p.exact();
    begin[0] = 0, end[0] = p.options.causal && block == 0 ? 0 : static_cast<int>(p.codebook.num_codes);
    if (exact) {
      // If the window is narrower than the block, both ranges outside the window overlap and become one.
      const int stop = last - window, start = max(first + window, near_begin);
      const bool overlap = !p.options.causal && start < stop;
      begin[1] = near_begin, end[1] = overlap ? near_end : stop;
      begin[2] = start, end[2] = p.options.causal || overlap ? 0 : near_end;
      begin[3] = max(first - window + 1, near_begin),
      end[3] = min(p.options.causal ? last : last - 1 + window, near_end);
    } else {
      begin[1] = end[1] = begin[2] = end[2] = 0;
      begin[3] = near_begin, end[3] = near_end;
    }
    for (int i = 1; i < kRanges; ++i) {
      if (p.all_far() || end[i] < begin[i] || (exact && i == 3 && window == 0)) {
        end[i] = begin[i];
      }
    }
  }

  LONGVQ_DEVICE int tiles_of(int range, int tile_size) const {
    return (end[range] - begin[range] + tile_size - 1) / tile_size;
  }

  LONGVQ_DEVICE int count(int tile_size) const {
    return tiles_of(0, tile_size) + tiles_of(1, tile_size) + tiles_of(2, tile_size) + tiles_of(3, tile_size);
  }

  // Tile `index`. The last tile of a range may be shorter.
  LONGVQ_DEVICE ColumnRange at(int index, int tile_size) const {
    ColumnRange found{ColumnRange::kCodes, 0, 0};
#pragma unroll
    for (int i = 0; i < kRanges; ++i) {
      const int count = tiles_of(i, tile_size);
      if (index >= 0 && index < count) {
        found.kind = i == 0   ? ColumnRange::kCodes
                     : !exact ? ColumnRange::kBoth
                     : i == 3 ? ColumnRange::kInside
                              : ColumnRange::kOutside;
        found.first = begin[i] + index * tile_size;
        found.last = min(end[i], found.first + tile_size);
      }
      index -= count;
    }
    return found;
  }
};

}  // namespace longvq::cuda
