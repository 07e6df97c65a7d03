// The columns that a block of queries sees, in tiles: codes, keys outside the window one by one, keys inside it.
#pragma once

#include "../../common/dispatch.h"

namespace longvq::cuda {

struct Columns {
  enum Kind { kCodes, kOutside, kInside, kBoth };  // kBoth: keys inside and outside, all known by their codewords

  Kind kind;
  int first, last;  // of codes or of keys
};

// For queries first .. last, `last` not included. Small, since it lives as long as the products: 32-bit numbers, and
// the kinds of ranges are known by their places.
struct ColumnTiles {
  static constexpr int kRanges = 4;

  int begin[kRanges], end[kRanges];
  bool exact;

  // Of a sequence of that length.
  LONGVQ_DEVICE ColumnTiles(const Attention& p, int first, int last, int length) {
    const int window = static_cast<int>(p.window), reach = max(window, 1);
    const int block = first / static_cast<int>(kFarBlock) * static_cast<int>(kFarBlock);
    const int before = max(block - reach + 1, 0);  // keys from here are not in the far field
    const int behind = p.causal ? last : min(block + static_cast<int>(kFarBlock) - 1 + reach, length);  // here again
    exact = p.exact;
    begin[0] = 0, end[0] = p.causal && block == 0 ? 0 : static_cast<int>(p.codebook.codes);
    if (exact) {
      // Outside on either side; of a window narrower than the block the two sides meet.
      const int stop = last - window, start = max(first + window, before);
      const bool meet = !p.causal && start < stop;
      begin[1] = before, end[1] = meet ? behind : stop;
      begin[2] = start, end[2] = p.causal || meet ? 0 : behind;
      begin[3] = max(first - window + 1, before), end[3] = min(p.causal ? last : last - 1 + window, behind);
    } else {
      begin[1] = end[1] = begin[2] = end[2] = 0;
      begin[3] = before, end[3] = behind;
    }
    for (int i = 1; i < kRanges; ++i) {
      if (p.all_far() || end[i] < begin[i] || (exact && i == 3 && window == 0)) {
        end[i] = begin[i];
      }
    }
  }

  LONGVQ_DEVICE int tiles_of(int range, int tile) const { return (end[range] - begin[range] + tile - 1) / tile; }

  LONGVQ_DEVICE int count(int tile) const {
    return tiles_of(0, tile) + tiles_of(1, tile) + tiles_of(2, tile) + tiles_of(3, tile);
  }

  // The tile with that number, its range cut to what it holds.
  LONGVQ_DEVICE Columns at(int number, int tile) const {
    Columns found{Columns::kCodes, 0, 0};
#pragma unroll
    for (int i = 0; i < kRanges; ++i) {
      const int count = tiles_of(i, tile);
      if (number >= 0 && number < count) {
        found.kind = i == 0 ? Columns::kCodes : !exact ? Columns::kBoth : i == 3 ? Columns::kInside : Columns::kOutside;
        found.first = begin[i] + number * tile;
        found.last = min(end[i], found.first + tile);
      }
      number -= count;
    }
    return found;
  }
};

}  // namespace longvq::cuda
