// The backward of one block. P are the weights, dP = dO V^T, and dS the gradients of the scores; with softmax dS = P
// (dP - dO . O). The code processes one chunk of columns at a time and computes its weights again. Every gradient is a
// product with P or dS.
#pragma once

#include "products.h"
#include "weights.h"

namespace longvq {
namespace {

// Turns scores into P and dP into dS for the columns of one query. A column stands for counts[c] keys, or for one key
// if `counts` is nullptr.
inline void weigh_row(
    const AttentionGradientBlock& block, int64_t row, int64_t columns, const float* offsets, const float* counts,
    float* scores, float* d_scores) {
  if (block.activation == Activation::kLaplace) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Floats score = load<Floats>(scores + c);
      store(d_scores + c, load<Floats>(d_scores + c) * laplace_slope(score));
    }
    for (int64_t c = 0; c < columns; ++c) {
      scores[c] = laplace(scores[c]);
    }
    return;
  }
  const float max_score = block.max_score[row], share = 1.0f / block.weight_sum[row], delta = block.delta[row];
  for (int64_t c = 0; c < columns; c += kLanes) {
    Floats score = load<Floats>(scores + c) - max_score;
    score = offsets == nullptr ? score : score + load<Floats>(offsets + c);
    const Floats weight = exp_negative(score) * share;
    const Floats removed = counts == nullptr ? Floats{} + delta : delta * load<Floats>(counts + c);
    store(scores + c, weight);
    store(d_scores + c, weight * (load<Floats>(d_scores + c) - removed));
  }
}

// Adds the gradients through codes first .. last.
inline void far_gradients(const AttentionGradientBlock& block, int64_t first, int64_t last) {
  const int64_t rows = block.rows, columns = last - first, head_dim = block.far_head_dim, value_dim = block.value_dim;
  const Out scores{block.scores, kChunkStride}, d_scores{block.d_scores, kChunkStride};
  product<false>(
      rows, Left<false>{block.far_queries, head_dim}, {block.codebook + first * head_dim, head_dim, 0, head_dim},
      columns, scores);
  product<false>(
      rows, Left<false>{block.grad, block.value_columns},
      {block.far_values + first * value_dim, value_dim, 0, value_dim}, columns, d_scores);
  for (int64_t row = 0; row < rows; ++row) {
    weigh_row(
        block, row, columns, block.far_offsets + first, block.far_counts + first, block.scores + row * kChunkStride,
        block.d_scores + row * kChunkStride);
  }
  product<true>(
      columns, Left<true>{block.scores, kChunkStride}, {block.grad_panels, rows, 0, rows}, block.value_columns,
      {block.d_far_values + first * block.value_columns, block.value_columns});
  if (block.shares_gradients) {
    product<true>(
        columns, Left<true>{block.d_scores, kChunkStride}, {block.far_query_panels, rows, 0, rows},
        block.far_head_columns, {block.d_codes + first * block.far_head_columns, block.far_head_columns});
  }
  product<true>(
      rows, Left<false>{block.d_scores, kChunkStride}, {block.codebook_rows, block.far_columns, first, columns},
      block.far_head_columns, {block.d_far_queries, block.far_head_columns});
}

// Whether a chunk has pairs inside the window, and allowed pairs outside it.
struct Split {
  bool inside, outside;
};

// Moves dS of pairs inside the window from d_scores to d_scores_inside, and adds it to the gradient of the bias.
inline Split split_by_window(const AttentionGradientBlock& block, int64_t first, int64_t last) {
  Split found{false, false};
  for (int64_t row = 0; row < block.rows; ++row) {
    const Columns window = window_of(block, row, first, last);
    float *inside = block.d_scores_inside + row * kChunkStride, *d_scores = block.d_scores + row * kChunkStride;
    for (int64_t c = first; c < last; ++c) {
      const bool in_window = c >= window.first && c < window.last;
      inside[c - first] = in_window ? d_scores[c - first] : 0.0f;
      d_scores[c - first] = in_window ? 0.0f : d_scores[c - first];
    }
    if (block.bias != nullptr) {
      double* d_bias = block.d_bias + block.window - 1 - (row - block.first_key);
      for (int64_t c = window.first; c < window.last; ++c) {
        d_bias[c] += static_cast<double>(inside[c - first]);
      }
    }
    found.inside |= window.last > window.first;
    // Causal: keys after the window are in the future, and not allowed.
    found.outside |= window.first > first || (!block.causal && window.last < last);
  }
  return found;
}

// Adds the gradients through near keys first .. last.
inline void near_gradients(const AttentionGradientBlock& block, int64_t first, int64_t last) {
  const int64_t rows = block.rows, columns = last - first, value_dim = block.value_dim, near = block.near_columns;
  const int64_t head_dim = block.head_dim, far_head_dim = block.far_head_dim;
  const Left<false> near_queries{block.queries, head_dim}, far_queries{block.far_queries, far_head_dim};
  const Out scores{block.scores, kChunkStride}, d_scores{block.d_scores, kChunkStride},
      exact{block.d_scores_inside, kChunkStride};
  product<false>(
      rows, far_queries, {block.codewords + first * far_head_dim, far_head_dim, 0, far_head_dim}, columns, scores);
  if (block.exact_keys != nullptr) {
    product<false>(rows, near_queries, {block.exact_keys + first * head_dim, head_dim, 0, head_dim}, columns, exact);
  }
  product<false>(
      rows, Left<false>{block.grad, block.value_columns},
      {block.near_values + first * value_dim, value_dim, 0, value_dim}, columns, d_scores);
  for (int64_t row = 0; row < rows; ++row) {
    float* row_scores = block.scores + row * kChunkStride;
    mask_near(block, row, first, last, row_scores, block.d_scores_inside + row * kChunkStride);
    weigh_row(block, row, columns, nullptr, nullptr, row_scores, block.d_scores + row * kChunkStride);
  }
  product<true>(
      columns, Left<true>{block.scores, kChunkStride}, {block.grad_panels, rows, 0, rows}, block.value_columns,
      {block.d_near_values + first * block.value_columns, block.value_columns});

  const Out d_queries{block.d_queries, block.head_columns};
  const Out d_far_queries{block.d_far_queries, block.far_head_columns};
  const Right codewords{block.codeword_rows, near, first, columns};
  const bool one_key = block.exact_keys == nullptr;  // the same codewords inside and outside the window
  if (one_key) {
    product<true>(rows, Left<false>{block.d_scores, kChunkStride}, codewords, block.far_head_columns, d_far_queries);
  }
  const Split found = split_by_window(block, first, last);
  const Left<false> inside{block.d_scores_inside, kChunkStride}, outside{block.d_scores, kChunkStride};
  const Right query_panels{block.query_panels, rows, 0, rows}, far_query_panels{block.far_query_panels, rows, 0, rows};
  if (found.inside) {
    if (!one_key) {
      product<true>(rows, inside, {block.exact_rows, near, first, columns}, block.head_columns, d_queries);
    }
    product<true>(
        columns, Left<true>{block.d_scores_inside, kChunkStride}, query_panels, block.head_columns,
        {block.d_keys_inside + first * block.head_columns, block.head_columns});
  }
  if (found.outside && !one_key) {
    product<true>(rows, outside, codewords, block.far_head_columns, d_far_queries);
  }
  if (found.outside && block.shares_gradients) {
    product<true>(
        columns, Left<true>{block.d_scores, kChunkStride}, far_query_panels, block.far_head_columns,
        {block.d_keys_outside + first * block.far_head_columns, block.far_head_columns});
  }
}

// delta = dO . O of ROWS queries. Sums over E with the same instructions as dP, so that a query with a single key has
// exactly dS = 0.
template <int ROWS>
inline void find_deltas(const AttentionGradientBlock& block, int64_t first) {
  const float *grad = block.grad + first * block.value_columns, *out = block.out + first * block.value_columns;
  Floats delta[ROWS] = {};
  for (int64_t e = 0; e < block.value_dim; ++e) {
    for (int r = 0; r < ROWS; ++r) {
      Floats grads = Floats{} + grad[r * block.value_columns + e];
      keep(grads);  // otherwise compilers use a single lane and separate multiplications and additions
      delta[r] += grads * out[r * block.value_columns + e];
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    block.delta[first + r] = delta[r][0];
  }
}

inline void backward(const AttentionGradientBlock& block) {
  constexpr int kTogether = 8;  // independent sums, which hide the latency of additions
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
