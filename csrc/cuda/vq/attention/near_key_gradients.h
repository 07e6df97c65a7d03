// The gradients of keys near their queries, and of their values.
#pragma once

#include "key_block.h"

namespace longvq::cuda {
namespace {

// A block of keys that visits the queries near them: first for pairs inside the window, then for pairs outside it.
template <typename Element, int HEAD_DIM, int VALUE_DIM, Outputs OUTPUTS>
struct NearKeyGradient : KeyBlock<Element, HEAD_DIM, VALUE_DIM, OUTPUTS> {
  using Base = KeyBlock<Element, HEAD_DIM, VALUE_DIM, OUTPUTS>;
  using Base::Base, Base::dkeys, Base::dvalues, Base::first, Base::first_value, Base::g, Base::head, Base::p;
  using typename Base::Operand, typename Base::Pairs;

  LONGVQ_DEVICE int last() const { return min(first + Base::kRows, head.length); }

  // Adds the value gradients of pairs inside or outside the window, and writes the key gradients of these pairs.
  LONGVQ_DEVICE void accumulate(bool inside) {
    const auto row_of = [&](int row) { return first + row < last() ? first + row : -1; };
    const bool exact = inside && p.exact();
    if (exact) {
      fill<Operand, kThreads>(this->keys(), head.template keys<Element>(this->aligned), row_of);
    } else {
      fill_packed<kThreads>(
          this->keys(), head.template codewords<Operand::kTerms, HEAD_DIM>(), padded_codes(p.codebook.num_codes),
          [&](int row) { return first + row < last() ? head.code_of(first + row) : -1; });
    }
    commit_copies();
    const int64_t reach = max(p.options.window, int64_t{1});
    // The queries that may have such a pair with one of these keys; score_of decides for each pair.
    const int64_t begin = inside ? (p.options.causal ? first : first - p.options.window + 1)
                                 : (p.options.causal ? first : (first - reach + 1) / kFarBlock * kFarBlock - kFarBlock);
    const int64_t end = inside ? last() - 1 + p.options.window : ((last() - 1 + reach - 1) / kFarBlock + 1) * kFarBlock;
    const auto score_of = [&](const Head& query_head, int64_t query, int row, float score) {
      const int64_t key = first + row, block = query / kFarBlock * kFarBlock;
      const bool near = key > block - reach && (p.options.causal || key < block + kFarBlock - 1 + reach);
      const ColumnRange::Kind kind = inside ? ColumnRange::kInside : ColumnRange::kOutside;
      return near ? query_head.score_of_key(kind, static_cast<int>(key - query), score) : -INFINITY;
    };
    const int64_t stop = min(end, int64_t{head.length});
    float counts[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = first + this->row(half);
      counts[half] = key < last() && !head.ignored(key) ? 1.0f : 0.0f;
    }
    this->for_each_query_tile(
        max(begin, int64_t{0}), stop, !exact, [&](const Head& query_head, int64_t query, int tile) {
          Pairs weights = {}, dscores = {};
          const auto score = [&](int64_t i, int row, float product) { return score_of(query_head, i, row, product); };
          const auto fill_slice = [&](int64_t slice) { fill_values(slice); };
          this->weights_and_dscores(weights, dscores, query_head, query, stop, tile, counts, score, fill_slice);
          if (OUTPUTS != kKeysOnly) {
            multiply_weights<Operand>(dvalues, weights, this->grads(tile));
          }
          if (OUTPUTS != kValuesOnly) {
            multiply_weights<Operand>(dkeys, dscores, this->queries(tile));
          }
        });
    if (OUTPUTS == kValuesOnly) {
      return;
    }
    float* to = inside ? g.dk_inside : g.dk_outside;
    const int64_t columns = exact ? p.head_dim : p.far_head_dim;
    this->write(dkeys, columns, [&](int row) { return row_of_array(to, row, columns); });
    Base::clear(dkeys);
  }

  // The row of one of these keys in an array (B, Hkv, L, columns), null where the key does not exist.
  LONGVQ_DEVICE float* row_of_array(float* array, int row, int64_t columns) const {
    return first + row < last() ? array + head.index_of_key(first + row) * columns : nullptr;
  }

  LONGVQ_DEVICE void fill_values(int64_t slice) const {
    const auto rows = head.template values<Element>(slice, columns_of_slice<VALUE_DIM>(p, slice), this->aligned);
    fill<Operand, kThreads>(this->values(), rows, [&](int row) { return first + row < last() ? first + row : -1; });
  }

  LONGVQ_DEVICE void run() {
    const Piece piece = piece_of(p, Base::kRows, blockIdx.x, blockIdx.z);
    head.enter(piece.sequence);
    first = static_cast<int>(piece.index) * Base::kRows;
    if (first >= head.length) {
      return;  // the whole block
    }
    fill_values(first_value);
    if (p.options.window > 0) {
      accumulate(true);
    } else if (OUTPUTS != kValuesOnly) {
      this->write(dkeys, p.head_dim, [&](int row) { return row_of_array(g.dk_inside, row, p.head_dim); });
    }
    if (!p.all_far()) {
      accumulate(false);
    } else if (OUTPUTS != kValuesOnly) {
      this->write(dkeys, p.far_head_dim, [&](int row) { return row_of_array(g.dk_outside, row, p.far_head_dim); });
    }
    if (OUTPUTS != kKeysOnly) {
      this->write_values([&](int row) { return row_of_array(g.dv_near, row, p.value_dim); });
    }
  }
};

template <typename Element, int HEAD_DIM, int VALUE_DIM, Outputs OUTPUTS>
__global__ void __launch_bounds__(kThreads, 2) differentiate_near_keys(AttentionGradients g, Alignment alignment) {
  NearKeyGradient<Element, HEAD_DIM, VALUE_DIM, OUTPUTS>(g, alignment).run();
}

}  // namespace
}  // namespace longvq::cuda
