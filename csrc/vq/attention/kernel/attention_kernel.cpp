// Compiled once per instruction set, with LONGVQ_ISA set to its name; see simd.h for what it may include.
//
// One block of queries: scores against codes and near keys, weights, and the weighted sum of values, all in a scratch
// that stays in the cache.
#include "backward.h"
#include "pack_columns.h"
#include "products.h"
#include "weights.h"

namespace longvq {
namespace {

inline float largest(Floats x) {
  float value = x[0];
  for (int i = 1; i < kLanes; ++i) {
    value = x[i] > value ? x[i] : value;
  }
  return value;
}

inline float sum_of(Floats x) {
  float value = x[0];
  for (int i = 1; i < kLanes; ++i) {
    value += x[i];
  }
  return value;
}

void softmax_weights(const AttentionBlock& block, int64_t row, float* scores) {
  const int64_t columns = block.far_columns + block.near_columns;
  Floats best = Floats{} - kInfinity;
  for (int64_t c = 0; c < columns; c += kLanes) {
    const Floats x = load<Floats>(scores + c);
    best = x > best ? x : best;
  }
  const float found = largest(best), top = found == -kInfinity ? 0.0f : found;  // none allowed: every weight is 0
  Floats total{};
  for (int64_t c = 0; c < columns; c += kLanes) {
    const Floats weight = exp_negative(load<Floats>(scores + c) - top);
    store(scores + c, weight);
    total += c < block.far_columns ? weight * load<Floats>(block.far_counts + c) : weight;
  }
  block.top[row] = top;
  block.total[row] = sum_of(total);
}

void forward(const AttentionBlock& block) {
  const int64_t far = block.far_columns, near = block.near_columns, columns = far + near;
  const int64_t near_depth = block.near_depth, far_depth = block.far_depth;
  const Left<false> near_queries{block.queries, near_depth}, far_queries{block.far_queries, far_depth};
  product<false>(block.rows, far_queries, {block.codebook, far_depth, 0, far_depth}, far, {block.scores, columns});
  product<false>(
      block.rows, far_queries, {block.codewords, far_depth, 0, far_depth}, near, {block.scores + far, columns});
  if (block.exact_keys != nullptr) {
    product<false>(block.rows, near_queries, {block.exact_keys, near_depth, 0, near_depth}, near, {block.exact, near});
  }
  for (int64_t row = 0; row < block.rows; ++row) {
    float* scores = block.scores + row * columns;
    for (int64_t c = 0; c < far; c += kLanes) {
      store(scores + c, load<Floats>(scores + c) + load<Floats>(block.far_offsets + c));
    }
    if (near > 0) {
      mask_near(block, row, 0, near, scores + far, block.exact + row * near);
    }
    if (block.activation == Activation::kSoftmax) {
      softmax_weights(block, row, scores);
    } else {
      for (int64_t c = 0; c < columns; ++c) {
        scores[c] = laplace(scores[c]);
      }
      block.top[row] = block.total[row] = 0.0f;
    }
  }
  const Out out{block.out, block.values};
  product<false>(block.rows, Left<false>{block.scores, columns}, {block.far_values, far, 0, far}, block.values, out);
  product<true>(
      block.rows, Left<false>{block.scores + far, columns}, {block.near_values, near, 0, near}, block.values, out);
}

}  // namespace

extern const AttentionKernel LONGVQ_JOIN(attention_kernel_, LONGVQ_ISA) = {
    kLanes, kPanel, &forward, &backward, &pack_columns};

}  // namespace longvq
