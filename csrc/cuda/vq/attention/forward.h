// Attention over quantised keys, forward: a block of queries past the codes with their far field, then past the keys
// near it, with a running softmax. See docs/kernels.md.
#pragma once

#include "query_block.h"

namespace longvq::cuda {
namespace {

// Rows of 16 queries for each warp: twice as many halve what is read from shared memory for each product, but take
// registers and, in three parts, shared memory.
template <typename Element, int DEPTH, int VALUES>
using ForwardBlock = QueryBlock<
    Element, DEPTH, VALUES, OperandOf<Element>::type::kParts == 1 ? 2 : 1,
    OperandOf<Element>::type::kParts == 1 || DEPTH <= 64 ? 2 : 1, 0>;

template <typename Element, int DEPTH, int VALUES>
struct Forward : ForwardBlock<Element, DEPTH, VALUES> {
  using Base = ForwardBlock<Element, DEPTH, VALUES>;
  using Operand = typename Base::Operand;
  using Base::first, Base::first_value, Base::head, Base::lane, Base::last, Base::p, Base::row, Base::warp;
  static constexpr int kMTiles = Base::kMTiles, kFragments = Base::kFragments;
  using Scores = float[kMTiles][kFragments][4];

  float out[kMTiles][VALUES / 8][4] = {};
  float top[kMTiles][2], total[kMTiles][2] = {}, scale[kMTiles][2];  // of rows lane / 4 and these + 8

  LONGVQ_DEVICE Forward(const Attention& problem, Alignment alignment) : Base(problem, alignment) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = first + row(m, half);
        top[m][half] = -INFINITY;
        scale[m][half] = query < last ? head.scale_of(query) : 0.0f;
      }
    }
  }

  // Products become scores: scaled, with what is added to those of a code or a pair.
  LONGVQ_DEVICE void finish_scores(
      Scores& scores, const Columns& columns, const float (&numbers)[kFragments][2]) const {
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = columns.first + n * 8 + lane % 4 * 2 + c;
        const bool there = column < columns.last;
        const bool code = columns.kind == Columns::kCodes;
        float add = there && (code || !head.ignored(column)) ? 0.0f : -INFINITY;
        if (there && code && !p.laplace) {
          add = numbers[n][c];
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
    if (head.differ(columns, first, last)) {
      look_at_pairs(scores, columns);
    }
  }

  LONGVQ_DEVICE void look_at_pairs(Scores& scores, const Columns& columns) const {
    const int ahead = columns.first - first + lane % 4 * 2;  // of the first query
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = scores[m][n][i];
          score = head.score_of_key(columns.kind, ahead + n * 8 + i % 2 - row(m, i / 2), score);
        }
      }
    }
  }

  // Scores become weights under a maximum that may have risen, for which what was summed before is scaled down.
  LONGVQ_DEVICE void soften(Scores& scores) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = top[m][half];
#pragma unroll
        for (int n = 0; n < kFragments; ++n) {
          highest = fmaxf(highest, fmaxf(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
        }
        highest = fmaxf(highest, shuffle_xor(highest, 1));
        highest = fmaxf(highest, shuffle_xor(highest, 2));
        const float safe = highest == -INFINITY ? 0.0f : highest;  // no allowed key yet
        const float shrink = Operand::exponential(top[m][half] - safe);
        top[m][half] = highest;
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
        total[m][half] = total[m][half] * shrink + sum;
        if (ballot(shrink != 1.0f) != 0) {  // later tiles seldom have a new maximum
#pragma unroll
          for (int n = 0; n < VALUES / 8; ++n) {
            out[m][n][half * 2] *= shrink;
            out[m][n][half * 2 + 1] *= shrink;
          }
        }
      }
    }
  }

  LONGVQ_DEVICE void weigh_by_laplace(Scores& scores, const float (&numbers)[kFragments][2]) const {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kFragments; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float weight = laplace(scores[m][n][i]);
          scores[m][n][i] = weight == 0.0f ? 0.0f : numbers[n][i % 2] * weight;  // of no code the number is not one
        }
      }
    }
  }

  LONGVQ_DEVICE void write() {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = total[m][half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        const int query = first + row(m, half);
        if (query >= last) {
          continue;
        }
        const int64_t place = head.place(query);
        sum = sum == 0.0f ? 1.0f : sum;  // no allowed key at all
        if (first_value == 0 && lane % 4 == 0) {
          p.normalizers[place * 2] = p.laplace || top[m][half] == -INFINITY ? 0.0f : top[m][half];
          p.normalizers[place * 2 + 1] = p.laplace ? 0.0f : sum;
        }
        const float factor = head.ignored(query) ? 0.0f : p.laplace ? 1.0f : 1.0f / sum;
        Element* to = static_cast<Element*>(p.out) + place * p.values + first_value;
        const int columns = this->columns_of_values(first_value);
        const auto value = [&](int n, int c) { return factor == 0.0f ? 0.0f : out[m][n][half * 2 + c] * factor; };
#pragma unroll
        for (int n = 0; n < VALUES / 8; ++n) {
          store_columns(to, n * 8 + lane % 4 * 2, columns, p.values % 2 == 0, value(n, 0), value(n, 1));
        }
      }
    }
  }

  LONGVQ_DEVICE void run() {
    const auto visit = [&](const Columns& columns, int number) {
      float scores[kMTiles][kFragments][4] = {}, numbers[kFragments][2];
      this->load_numbers(numbers, columns);
      multiply_rows<Operand>(scores, this->queries(), warp * kMTiles * 16, this->keys(number));
      finish_scores(scores, columns, numbers);
      if (p.laplace) {
        weigh_by_laplace(scores, numbers);
      } else {
        soften(scores);
      }
      multiply_weights<Operand>(out, scores, this->values(number));
    };
    this->past_all_columns(visit, [] {});
    write();
  }
};

template <typename Element, int DEPTH, int VALUES>
__global__ void __launch_bounds__(kThreads, 2) attend(Attention p, Alignment alignment) {
  Forward<Element, DEPTH, VALUES> forward(p, alignment);
  if (forward.has_queries()) {
    forward.run();
  }
}

template <typename Element>
int attend_as(const Attention& p, void* stream) {
  return for_depth(p.codebook.columns, [&](auto depth) {
    return for_depth(p.values < 128 ? p.values : 128, [&](auto values) {
      if constexpr (depth.value > 128 || values.value > 128) {
        return kNotCovered;
      } else {
        using S = ForwardBlock<Element, depth.value, values.value>;
        const dim3 grid(
            static_cast<unsigned>(p.pieces(S::kRows)),
            static_cast<unsigned>(p.heads * divide_up(p.values, values.value)), static_cast<unsigned>(p.batch));
        return launch<attend<Element, depth.value, values.value>>(
            grid, kThreads, S::kBytes, stream, p, alignment_of(p));
      }
    });
  });
}

}  // namespace
}  // namespace longvq::cuda
