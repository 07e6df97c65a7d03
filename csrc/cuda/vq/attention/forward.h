// Attention over quantised keys, forward: a block of queries visits the codes with the means of its far field, then the
// keys near the block, with a running softmax. See docs/kernels.md.
#pragma once

#include "query_block.h"

namespace longvq::cuda {
namespace {

// Each warp has 16 or 32 queries. 32 halve the reads from shared memory for each product, but take more registers and,
// with three terms, more shared memory.
template <typename Element, int HEAD_DIM, int VALUE_DIM>
using ForwardBlock = QueryBlock<
    Element, HEAD_DIM, VALUE_DIM, OperandOf<Element>::type::kTerms == 1 ? 2 : 1,
    OperandOf<Element>::type::kTerms == 1 || HEAD_DIM <= 64 ? 2 : 1, 0>;

template <typename Element, int HEAD_DIM, int VALUE_DIM>
struct Forward : ForwardBlock<Element, HEAD_DIM, VALUE_DIM> {
  using Base = ForwardBlock<Element, HEAD_DIM, VALUE_DIM>;
  using Operand = typename Base::Operand;
  using Base::first, Base::first_value, Base::head, Base::lane, Base::last, Base::p, Base::row, Base::warp;
  static constexpr int kMTiles = Base::kMTiles, kFragments = Base::kFragments;
  using Scores = float[kMTiles][kFragments][4];

  float out[kMTiles][VALUE_DIM / 8][4] = {};
  float row_max[kMTiles][2], row_sum[kMTiles][2] = {}, scale[kMTiles][2];  // for rows lane / 4 and lane / 4 + 8

  LONGVQ_DEVICE Forward(const Attention& problem, Alignment alignment) : Base(problem, alignment) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = first + row(m, half);
        row_max[m][half] = -INFINITY;
        scale[m][half] = query < last ? head.scale_of(query) : 0.0f;
      }
    }
  }

  // Turns products into scores: scales them and adds the log counts of codes, the bias, and −infinity where a pair is
  // not allowed.
  LONGVQ_DEVICE void finish_scores(
      Scores& scores, const ColumnRange& columns, const float (&counts)[kFragments][2]) const {
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = columns.first + n * 8 + lane % 4 * 2 + c;
        const bool valid = column < columns.last;
        const bool code = columns.kind == ColumnRange::kCodes;
        float add = valid && (code || !head.ignored(column)) ? 0.0f : -INFINITY;
        if (valid && code && !p.laplace()) {
          add = counts[n][c];
        }
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& score = scores[m][n][half * 2 + c];
            score = score * scale[m][half] + add;
          }
        }
      }
    }
    if (head.needs_pair_scores(columns, first, last)) {
      apply_window_and_bias(scores, columns);
    }
  }

  LONGVQ_DEVICE void apply_window_and_bias(Scores& scores, const ColumnRange& columns) const {
    const int offset = columns.first - first + lane % 4 * 2;  // of this lane's first column, from the first query
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = scores[m][n][i];
          score = head.score_of_key(columns.kind, offset + n * 8 + i % 2 - row(m, i / 2), score);
        }
      }
    }
  }

  // Turns scores into weights exp(score − row_max). If the maximum has risen, scales down what was summed before.
  LONGVQ_DEVICE void apply_softmax(Scores& scores) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = row_max[m][half];
#pragma unroll
        for (int n = 0; n < kFragments; ++n) {
          highest = fmaxf(highest, fmaxf(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
        }
        highest = fmaxf(highest, shuffle_xor(highest, 1));
        highest = fmaxf(highest, shuffle_xor(highest, 2));
        const float safe = highest == -INFINITY ? 0.0f : highest;  // if no key has been allowed yet
        const float shrink = Operand::exponential(row_max[m][half] - safe);
        row_max[m][half] = highest;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < kFragments; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& score = scores[m][n][half * 2 + c];
            score = Operand::exponential(score - safe);
            sum += score;
          }
        }
        row_sum[m][half] = row_sum[m][half] * shrink + sum;
        if (ballot(shrink != 1.0f) != 0) {  // later tiles seldom have a new maximum
#pragma unroll
          for (int n = 0; n < VALUE_DIM / 8; ++n) {
            out[m][n][half * 2] *= shrink;
            out[m][n][half * 2 + 1] *= shrink;
          }
        }
      }
    }
  }

  LONGVQ_DEVICE void apply_laplace(Scores& scores, const float (&counts)[kFragments][2]) const {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kFragments; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float weight = laplace(scores[m][n][i]);
          // The counts of padding codes are undefined, but their weights are 0.
          scores[m][n][i] = weight == 0.0f ? 0.0f : counts[n][i % 2] * weight;
        }
      }
    }
  }

  LONGVQ_DEVICE void write() {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = row_sum[m][half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        const int query = first + row(m, half);
        if (query >= last) {
          continue;
        }
        const int64_t index = head.index_of_query(query);
        sum = sum == 0.0f ? 1.0f : sum;  // if no key is allowed
        if (first_value == 0 && lane % 4 == 0) {
          p.normalizers[index * 2] = p.laplace() || row_max[m][half] == -INFINITY ? 0.0f : row_max[m][half];
          p.normalizers[index * 2 + 1] = p.laplace() ? 0.0f : sum;
        }
        const float factor = head.ignored(query) ? 0.0f : p.laplace() ? 1.0f : 1.0f / sum;
        Element* to = static_cast<Element*>(p.out) + index * p.value_dim + first_value;
        const int columns = columns_of_slice<VALUE_DIM>(p, first_value);
        const auto value = [&](int n, int c) { return factor == 0.0f ? 0.0f : out[m][n][half * 2 + c] * factor; };
#pragma unroll
        for (int n = 0; n < VALUE_DIM / 8; ++n) {
          store_columns(to, n * 8 + lane % 4 * 2, columns, p.value_dim % 2 == 0, value(n, 0), value(n, 1));
        }
      }
    }
  }

  LONGVQ_DEVICE void run() {
    const auto visit = [&](const ColumnRange& columns, int index) {
      float scores[kMTiles][kFragments][4] = {}, counts[kFragments][2];
      this->load_counts(counts, columns);
      multiply_rows<Operand>(scores, this->queries(), warp * kMTiles * 16, this->keys(index));
      finish_scores(scores, columns, counts);
      if (p.laplace()) {
        apply_laplace(scores, counts);
      } else {
        apply_softmax(scores);
      }
      multiply_weights<Operand>(out, scores, this->values(index));
    };
    this->for_each_column_tile(visit, [] {});
    write();
  }
};

template <typename Element, int HEAD_DIM, int VALUE_DIM>
__global__ void __launch_bounds__(kThreads, 2) attend(Attention p, Alignment alignment) {
  Forward<Element, HEAD_DIM, VALUE_DIM> forward(p, alignment);
  if (forward.has_queries()) {
    forward.run();
  }
}

template <typename Element>
int attend_as(const Attention& p, void* stream) {
  return for_tile_sizes(p, [&](auto head_dim, auto value_dim) {
    using Block = ForwardBlock<Element, head_dim.value, value_dim.value>;
    const dim3 grid(
        static_cast<unsigned>(p.num_pieces(Block::kRows)),
        static_cast<unsigned>(p.heads * divide_up(p.value_dim, value_dim.value)), static_cast<unsigned>(p.batch));
    return launch<attend<Element, head_dim.value, value_dim.value>>(
        grid, kThreads, Block::kBytes, stream, p, alignment_of(p));
  });
}

}  // namespace
}  // namespace longvq::cuda
