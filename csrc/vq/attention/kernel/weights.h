// The scores of near keys, and the functions that turn scores into weights.
#pragma once

#include "../../../common/numbers.h"
#include "../../../common/simd.h"
#include "../../exp_negative.h"
#include "../../laplace.h"
#include "attention_kernel.h"

namespace longvq {
namespace {

// A range of columns.
struct Columns {
  int64_t first, last;
};

// The columns inside the window of query `row`, limited to first .. last.
inline Columns window_of(const AttentionScores& block, int64_t row, int64_t first, int64_t last) {
  // key - query is in (-W, W), if causal in (-W, 0]
  const int64_t at_query = row - block.first_key;  // the column of the key at the query's position
  const int64_t begin = at_query - block.window + 1, end = block.causal ? at_query + 1 : at_query + block.window;
  const int64_t cut = begin < first ? first : begin > last ? last : begin;
  return {cut, end > last ? last : end < cut ? cut : end};
}

// Finishes the scores of near keys first .. last of one query: exact scores and the bias inside the window, -infinity
// for keys that are not allowed. `scores` and `exact_scores` begin at column `first`.
inline void mask_near(
    const AttentionScores& block, int64_t row, int64_t first, int64_t last, float* scores, const float* exact_scores) {
  const float* offsets = block.near_offsets;
  for (int64_t c = first; c < last; c += kLanes) {
    store(scores + c - first, load<Floats>(scores + c - first) + load<Floats>(offsets + c));
  }
  const Columns window = window_of(block, row, first, last);
  const int64_t at_query = row - block.first_key;
  if (block.exact_keys != nullptr) {
    for (int64_t c = window.first; c < window.last; ++c) {
      scores[c - first] = exact_scores[c - first] + offsets[c];
    }
  }
  if (block.bias != nullptr) {
    const float* bias = block.bias + block.window - 1 - at_query;
    for (int64_t c = window.first; c < window.last; ++c) {
      scores[c - first] += bias[c];
    }
  }
  if (block.causal) {
    for (int64_t c = at_query + 1 < first ? first : at_query + 1; c < last; ++c) {
      scores[c - first] = -kInfinity;
    }
  }
}

// The derivative of laplace, the density of a normal distribution.
inline Floats laplace_slope(Floats x) {
  const Floats y = (x - kLaplaceMean) * kLaplaceInverseWidth;
  return kLaplacePeak * exp_negative(-y * y);
}

}  // namespace
}  // namespace longvq
