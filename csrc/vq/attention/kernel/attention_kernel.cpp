// Compiled once per instruction set, with LONGVQ_ISA set to its name; common/simd.h says what such a file may include.
//
// The forward of one block of queries: scores of codes and near keys, their weights, and the weighted sum of values.
// All buffers stay in the cache.
#include "backward.h"
#include "pack_columns.h"
#include "products.h"
#include "weights.h"

namespace longvq {
namespace {

void softmax_weights(const AttentionBlock& block, int64_t row, float* scores) {
  const int64_t columns = block.far_columns + block.near_columns;
  Floats best = Floats{} - kInfinity;
  for (int64_t c = 0; c < columns; c += kLanes) {
    const Floats x = load<Floats>(scores + c);
    best = x > best ? x : best;
  }
  const float found = largest(best),
              max_score = found == -kInfinity ? 0.0f : found;  // no key is allowed: every weight is 0
  Floats weight_sum{};
  for (int64_t c = 0; c < columns; c += kLanes) {
    const Floats weight = exp_negative(load<Floats>(scores + c) - max_score);
    store(scores + c, weight);
    weight_sum += c < block.far_columns ? weight * load<Floats>(block.far_counts + c) : weight;
  }
  block.max_score[row] = max_score;
  block.weight_sum[row] = sum_of(weight_sum);
}

void forward(const AttentionBlock& block) {
  const int64_t far = block.far_columns, near = block.near_columns, columns = far + near;
  const int64_t head_dim = block.head_dim, far_head_dim = block.far_head_dim;
  const Left<false> near_queries{block.queries, head_dim}, far_queries{block.far_queries, far_head_dim};
  product<false>(
      block.rows, far_queries, {block.codebook, far_head_dim, 0, far_head_dim}, far, {block.scores, columns});
  product<false>(
      block.rows, far_queries, {block.codewords, far_head_dim, 0, far_head_dim}, near, {block.scores + far, columns});
  if (block.exact_keys != nullptr) {
    product<false>(
        block.rows, near_queries, {block.exact_keys, head_dim, 0, head_dim}, near, {block.exact_scores, near});
  }
  for (int64_t row = 0; row < block.rows; ++row) {
    float* scores = block.scores + row * columns;
    for (int64_t c = 0; c < far; c += kLanes) {
      store(scores + c, load<Floats>(scores + c) + load<Floats>(block.far_offsets + c));
    }
    if (near > 0) {
      mask_near(block, row, 0, near, scores + far, block.exact_scores + row * near);
    }
    if (block.activation == Activation::kSoftmax) {
      softmax_weights(block, row, scores);
    } else {
      for (int64_t c = 0; c < columns; ++c) {
        scores[c] = laplace(scores[c]);
      }
      block.max_score[row] = block.weight_sum[row] = 0.0f;
    }
  }
  const Out out{block.out, block.value_columns};
  product<false>(
      block.rows, Left<false>{block.scores, columns}, {block.far_values, far, 0, far}, block.value_columns, out);
  product<true>(
      block.rows, Left<false>{block.scores + far, columns}, {block.near_values, near, 0, near}, block.value_columns,
      out);
}

}  // namespace

extern const AttentionKernel LONGVQ_JOIN(attention_kernel_, LONGVQ_ISA) = {
    kLanes, kPanel, &forward, &backward, &pack_columns};

}  // namespace longvq
