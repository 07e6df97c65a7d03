// The columns that a block of queries sees, in tiles: codes, keys outside the window one by one, keys inside it.
#pragma once

#include "cover.h"

namespace longvq::cuda {

struct Columns {
  enum Kind { kCodes, kOutside, kInside, kBoth };  // kBoth: keys inside and outside, all known by their codewords

  Kind kind;
  int64_t first, last;  // of codes or of keys
};

// For queries first .. last, `last` not included.
struct ColumnTiles {
  Columns ranges[4];
  int counts[4];  // of tiles

  LONGVQ_DEVICE ColumnTiles(const Attention& p, int64_t first, int64_t last, int tile) {
    const int64_t block = first / kFarBlock * kFarBlock, reach = max(p.window, int64_t{1});
    const bool all_far = p.window == 0 && !p.causal;
    const int64_t before = max(block - reach + 1, int64_t{0});  // keys from here are not in the far field
    const int64_t behind = p.causal ? last : min(block + kFarBlock - 1 + reach, p.length);  // from here they are again
    ranges[0] = {Columns::kCodes, 0, p.codebook.codes};
    if (p.exact) {
      // Outside on either side; of a window narrower than the block the two sides meet.
      const int64_t end = last - p.window, begin = max(first + p.window, before);
      const bool meet = !p.causal && begin < end;
      ranges[1] = {Columns::kOutside, before, meet ? behind : end};
      ranges[2] = {Columns::kOutside, begin, p.causal || meet ? 0 : behind};
      ranges[3] = {
          Columns::kInside, max(first - p.window + 1, before), min(p.causal ? last : last - 1 + p.window, behind)};
    } else {
      ranges[1] = ranges[2] = {Columns::kBoth, 0, 0};
      ranges[3] = {Columns::kBoth, before, behind};
    }
    for (int i = 0; i < 4; ++i) {
      const bool none = i > 0 && (all_far || (ranges[i].kind == Columns::kInside && p.window == 0));
      const int64_t count = none ? 0 : ranges[i].last - ranges[i].first;
      counts[i] = count > 0 ? static_cast<int>(divide_up(count, tile)) : 0;
    }
  }

  LONGVQ_DEVICE int count() const { return counts[0] + counts[1] + counts[2] + counts[3]; }

  // The tile with that number, its range cut to what it holds.
  LONGVQ_DEVICE Columns at(int number, int tile) const {
    Columns found = ranges[0];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (number >= 0 && number < counts[i]) {
        found = ranges[i];
        found.first += static_cast<int64_t>(number) * tile;
        found.last = min(found.last, found.first + tile);
      }
      number -= counts[i];
    }
    return found;
  }
};

}  // namespace longvq::cuda
