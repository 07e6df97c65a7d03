// Launches the three gradient kernels of attention for one dtype: of queries, of codes, and of keys near their queries.
#pragma once

#include "code_gradients.h"
#include "near_key_gradients.h"
#include "query_gradients.h"

namespace longvq::cuda {
namespace {

template <typename Element, int HEAD_DIM, int VALUE_DIM, Outputs OUTPUTS>
int differentiate_keys(const AttentionGradients& g, Alignment alignment, void* stream) {
  const Attention& p = g.forward;
  using Keys = KeyBlock<Element, HEAD_DIM, VALUE_DIM, OUTPUTS>;
  const int64_t slices = OUTPUTS == kValuesOnly ? divide_up(p.value_dim, VALUE_DIM) : 1;
  const auto grid = [&](int64_t blocks, int64_t rows) {
    return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(p.kv_heads * slices), static_cast<unsigned>(rows));
  };
  constexpr auto codes = differentiate_codes<Element, HEAD_DIM, VALUE_DIM, OUTPUTS>;
  const dim3 code_grid = grid(divide_up(p.codebook.num_codes, Keys::kRows), p.batch * p.num_pieces(g.code_segment));
  if (const int error = launch<codes>(code_grid, kThreads, Keys::kBytes, stream, g, alignment)) {
    return error;
  }
  constexpr auto near = differentiate_near_keys<Element, HEAD_DIM, VALUE_DIM, OUTPUTS>;
  return launch<near>(grid(p.num_pieces(Keys::kRows), p.batch), kThreads, Keys::kBytes, stream, g, alignment);
}

template <typename Element, int HEAD_DIM, int VALUE_DIM>
int differentiate(const AttentionGradients& g, Alignment alignment, void* stream) {
  const Attention& p = g.forward;
  using Queries = typename QueryGradientShape<Element, HEAD_DIM, VALUE_DIM>::Block;
  static_assert(Queries::kRows == kGradientRows, "dbias_per_block has a row for each block");
  const dim3 grid(
      static_cast<unsigned>(p.num_pieces(Queries::kRows)), static_cast<unsigned>(p.heads),
      static_cast<unsigned>(p.batch));
  constexpr auto queries = differentiate_queries<Element, HEAD_DIM, VALUE_DIM>;
  if (const int error = launch<queries>(grid, kThreads, Queries::kBytes, stream, g, alignment)) {
    return error;
  }
  // Gradients of keys and of values at once spill registers where either has more than 64 columns.
  if constexpr (HEAD_DIM == 64 && VALUE_DIM == 64) {
    return differentiate_keys<Element, HEAD_DIM, VALUE_DIM, kKeysAndValues>(g, alignment, stream);
  } else {
    if (const int error = differentiate_keys<Element, HEAD_DIM, VALUE_DIM, kKeysOnly>(g, alignment, stream)) {
      return error;
    }
    return differentiate_keys<Element, HEAD_DIM, VALUE_DIM, kValuesOnly>(g, alignment, stream);
  }
}

template <typename Element>
int differentiate_as(const AttentionGradients& g, void* stream) {
  const Attention& p = g.forward;
  Alignment alignment = alignment_of(p);
  alignment.grad = rows_aligned(g.grad, p.type, g.grad_strides);
  return for_tile_sizes(p, [&](auto head_dim, auto value_dim) {
    return differentiate<Element, head_dim.value, value_dim.value>(g, alignment, stream);
  });
}

}  // namespace
}  // namespace longvq::cuda
