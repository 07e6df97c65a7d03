// The backward of one block. With P the weights, dP = dO V^T and dS the gradient of the scores (softmax: P (dP -
// dO.O)), the weights of a few columns at a time are computed again, and every gradient is a product with P or dS.
#pragma once

#include "products.h"
#include "weights.h"

namespace longvq {
namespace {

// Turns scores into weights and dP into dS: columns of one query, `counts` keys behind each (nullptr: one).
inline void weigh_row(
    const AttentionGradientBlock& block, int64_t row, int64_t columns, const float* offsets, const float* counts,
    float* scores, float* slopes) {
  if (block.activation == Activation::kLaplace) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Floats score = load<Floats>(scores + c);
      store(slopes + c, load<Floats>(slopes + c) * laplace_slope(score));
    }
    for (int64_t c = 0; c < columns; ++c) {
      scores[c] = laplace(scores[c]);
    }
    return;
  }
  const float top = block.top[row], share = 1.0f / block.total[row], delta = block.delta[row];
  for (int64_t c = 0; c < columns; c += kLanes) {
    Floats score = load<Floats>(scores + c) - top;
    score = offsets == nullptr ? score : score + load<Floats>(offsets + c);
    const Floats weight = exp_negative(score) * share;
    const Floats removed = counts == nullptr ? Floats{} + delta : delta * load<Floats>(counts + c);
    store(scores + c, weight);
    store(slopes + c, weight * (load<Floats>(slopes + c) - removed));
  }
}

// Codes first .. last as far keys.
inline void far_gradients(const AttentionGradientBlock& block, int64_t first, int64_t last) {
  const int64_t rows = block.rows, columns = last - first, depth = block.far_depth, values = block.values;
  const Out scores{block.scores, kChunkStride}, slopes{block.slopes, kChunkStride};
  product<false>(
      rows, Left<false>{block.far_queries, depth}, {block.codebook + first * depth, depth, 0, depth}, columns, scores);
  product<false>(
      rows, Left<false>{block.grad, block.value_columns}, {block.far_values + first * values, values, 0, values},
      columns, slopes);
  for (int64_t row = 0; row < rows; ++row) {
    weigh_row(
        block, row, columns, block.far_offsets + first, block.far_counts + first, block.scores + row * kChunkStride,
        block.slopes + row * kChunkStride);
  }
  product<true>(
      columns, Left<true>{block.scores, kChunkStride}, {block.grad_panels, rows, 0, rows}, block.value_columns,
      {block.d_far_values + first * block.value_columns, block.value_columns});
  if (block.cluster) {
    product<true>(
        columns, Left<true>{block.slopes, kChunkStride}, {block.far_query_panels, rows, 0, rows},
        block.far_depth_columns, {block.d_codes + first * block.far_depth_columns, block.far_depth_columns});
  }
  product<true>(
      rows, Left<false>{block.slopes, kChunkStride}, {block.codebook_rows, block.far_columns, first, columns},
      block.far_depth_columns, {block.d_far_queries, block.far_depth_columns});
}

// Moves the part of dS inside the window of each query to `inside`; returns whether the chunk has pairs in it, and
// whether it has other pairs that are allowed.
struct Split {
  bool inside, outside;
};

inline Split split_by_window(const AttentionGradientBlock& block, int64_t first, int64_t last) {
  Split found{false, false};
  for (int64_t row = 0; row < block.rows; ++row) {
    const Columns window = window_of(block, row, first, last);
    float *inside = block.inside + row * kChunkStride, *slopes = block.slopes + row * kChunkStride;
    for (int64_t c = first; c < last; ++c) {
      const bool in_window = c >= window.first && c < window.last;
      inside[c - first] = in_window ? slopes[c - first] : 0.0f;
      slopes[c - first] = in_window ? 0.0f : slopes[c - first];
    }
    if (block.bias != nullptr) {
      double* d_bias = block.d_bias + block.window - 1 - (row - block.first_key);
      for (int64_t c = window.first; c < window.last; ++c) {
        d_bias[c] += static_cast<double>(inside[c - first]);
      }
    }
    found.inside |= window.last > window.first;
    // Causal: what lies behind a window is the future, not allowed.
    found.outside |= window.first > first || (!block.causal && window.last < last);
  }
  return found;
}

// Near keys first .. last.
inline void near_gradients(const AttentionGradientBlock& block, int64_t first, int64_t last) {
  const int64_t rows = block.rows, columns = last - first, values = block.values, near = block.near_columns;
  const int64_t near_depth = block.near_depth, far_depth = block.far_depth;
  const Left<false> near_queries{block.queries, near_depth}, far_queries{block.far_queries, far_depth};
  const Out scores{block.scores, kChunkStride}, slopes{block.slopes, kChunkStride}, exact{block.inside, kChunkStride};
  product<false>(rows, far_queries, {block.codewords + first * far_depth, far_depth, 0, far_depth}, columns, scores);
  if (block.exact_keys != nullptr) {
    product<false>(
        rows, near_queries, {block.exact_keys + first * near_depth, near_depth, 0, near_depth}, columns, exact);
  }
  product<false>(
      rows, Left<false>{block.grad, block.value_columns}, {block.near_values + first * values, values, 0, values},
      columns, slopes);
  for (int64_t row = 0; row < rows; ++row) {
    float* row_scores = block.scores + row * kChunkStride;
    mask_near(block, row, first, last, row_scores, block.inside + row * kChunkStride);
    weigh_row(block, row, columns, nullptr, nullptr, row_scores, block.slopes + row * kChunkStride);
  }
  product<true>(
      columns, Left<true>{block.scores, kChunkStride}, {block.grad_panels, rows, 0, rows}, block.value_columns,
      {block.d_near_values + first * block.value_columns, block.value_columns});

  const Out d_queries{block.d_queries, block.near_depth_columns};
  const Out d_far_queries{block.d_far_queries, block.far_depth_columns};
  const Right codewords{block.codeword_rows, near, first, columns};
  const bool one_key = block.exact_keys == nullptr;  // inside the window and outside: queries see no difference
  if (one_key) {
    product<true>(rows, Left<false>{block.slopes, kChunkStride}, codewords, block.far_depth_columns, d_far_queries);
  }
  const Split part = split_by_window(block, first, last);
  const Left<false> inside{block.inside, kChunkStride}, outside{block.slopes, kChunkStride};
  const Right query_panels{block.query_panels, rows, 0, rows}, far_query_panels{block.far_query_panels, rows, 0, rows};
  if (part.inside) {
    if (!one_key) {
      product<true>(rows, inside, {block.exact_rows, near, first, columns}, block.near_depth_columns, d_queries);
    }
    product<true>(
        columns, Left<true>{block.inside, kChunkStride}, query_panels, block.near_depth_columns,
        {block.d_inside + first * block.near_depth_columns, block.near_depth_columns});
  }
  if (part.outside && !one_key) {
    product<true>(rows, outside, codewords, block.far_depth_columns, d_far_queries);
  }
  if (part.outside && block.cluster) {
    product<true>(
        columns, Left<true>{block.slopes, kChunkStride}, far_query_panels, block.far_depth_columns,
        {block.d_outside + first * block.far_depth_columns, block.far_depth_columns});
  }
}

// delta = dO . O of ROWS queries. One chain over E each, of the instructions that dP is made with: of a key that is
// alone both are equal, and dS is 0.
template <int ROWS>
inline void find_deltas(const AttentionGradientBlock& block, int64_t first) {
  const float *grad = block.grad + first * block.value_columns, *out = block.out + first * block.value_columns;
  Floats delta[ROWS] = {};
  for (int64_t e = 0; e < block.values; ++e) {
    for (int r = 0; r < ROWS; ++r) {
      Floats of_grad = Floats{} + grad[r * block.value_columns + e];
      keep(of_grad);  // or compilers would see that one lane is enough, and multiply apart from the addition
      delta[r] += of_grad * out[r * block.value_columns + e];
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    block.delta[first + r] = delta[r][0];
  }
}

inline void backward(const AttentionGradientBlock& block) {
  constexpr int kTogether = 8;  // chains that wait for their additions side by side
  int64_t row = 0;
  for (; row + kTogether <= block.rows; row += kTogether) {
    find_deltas<kTogether>(block, row);
  }
  for (; row < block.rows; ++row) {
    find_deltas<1>(block, row);
  }
  for (int64_t first = 0; first < block.far_columns; first += kChunk) {
    far_gradients(block, first, first + kChunk < block.far_columns ? first + kChunk : block.far_columns);
  }
  for (int64_t first = 0; first < block.near_columns; first += kChunk) {
    near_gradients(block, first, first + kChunk < block.near_columns ? first + kChunk : block.near_columns);
  }
}

}  // namespace
}  // namespace longvq
