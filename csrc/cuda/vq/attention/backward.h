// The three kernels of the attention's backward for one type.
#pragma once

#include "key_gradients.h"
#include "query_gradients.h"

namespace longvq::cuda {
namespace {

template <typename Element, int DEPTH, int VALUES, Makes MAKES>
int differentiate_keys(const AttentionGradients& g, Alignment alignment, void* stream) {
  const Attention& p = g.forward;
  using Keys = KeyBlock<Element, DEPTH, VALUES, MAKES>;
  const int64_t slices = MAKES == kValuesOnly ? divide_up(p.values, VALUES) : 1;
  const auto grid = [&](int64_t blocks, int64_t rows) {
    return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(p.kv_heads * slices), static_cast<unsigned>(rows));
  };
  constexpr auto codes = differentiate_codes<Element, DEPTH, VALUES, MAKES>;
  const dim3 of_codes = grid(divide_up(p.codebook.codes, Keys::kRows), p.batch * p.pieces(g.code_segment));
  if (const int error = launch<codes>(of_codes, kThreads, Keys::kBytes, stream, g, alignment)) {
    return error;
  }
  constexpr auto near = differentiate_near<Element, DEPTH, VALUES, MAKES>;
  return launch<near>(grid(p.pieces(Keys::kRows), p.batch), kThreads, Keys::kBytes, stream, g, alignment);
}

template <typename Element, int DEPTH, int VALUES>
int differentiate(const AttentionGradients& g, Alignment alignment, void* stream) {
  const Attention& p = g.forward;
  using Queries = typename QueryGradientShape<Element, DEPTH, VALUES>::Block;
  static_assert(Queries::kRows == kGradientRows, "as the workspace of the bias has them");
  const dim3 grid(
      static_cast<unsigned>(p.pieces(Queries::kRows)), static_cast<unsigned>(p.heads), static_cast<unsigned>(p.batch));
  constexpr auto queries = differentiate_queries<Element, DEPTH, VALUES>;
  if (const int error = launch<queries>(grid, kThreads, Queries::kBytes, stream, g, alignment)) {
    return error;
  }
  // Both at once keep more than the registers hold where either is wide.
  if constexpr (DEPTH == 64 && VALUES == 64) {
    return differentiate_keys<Element, DEPTH, VALUES, kKeysAndValues>(g, alignment, stream);
  } else {
    if (const int error = differentiate_keys<Element, DEPTH, VALUES, kKeysOnly>(g, alignment, stream)) {
      return error;
    }
    return differentiate_keys<Element, DEPTH, VALUES, kValuesOnly>(g, alignment, stream);
  }
}

template <typename Element>
int differentiate_as(const AttentionGradients& g, void* stream) {
  const Attention& p = g.forward;
  Alignment alignment = alignment_of(p);
  alignment.grad = aligned(g.grad, p.type, {g.grad_batch, g.grad_head, g.grad_length});
  return for_depth(p.codebook.columns, [&](auto depth) {
    return for_depth(p.values < 128 ? p.values : 128, [&](auto values) {
      if constexpr (depth.value > 128 || values.value > 128) {
        return kNotCovered;
      } else {
        return differentiate<Element, depth.value, values.value>(g, alignment, stream);
      }
    });
  });
}

}  // namespace
}  // namespace longvq::cuda
