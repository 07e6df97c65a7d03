// The gradient of the queries: as the forward goes past the columns, with weights made again from what it saved. And of
// the bias: every offset of a tile has one thread that sums it, so blocks add without atomics to rows of their own.
#pragma once

#include "query_block.h"

namespace longvq::cuda {
namespace {

template <typename Element, int DEPTH, int VALUES>
struct QueryGradientShape {
  using Operand = typename OperandOf<Element>::type;
  using Grads = Tile<16 * kWarps, VALUES, Operand::kParts>;
  static constexpr int kDiagonalPitch = kTileOf<Operand> + 1;
  static constexpr size_t kMore = Grads::kBytes + sizeof(float) * 16 * kWarps * kDiagonalPitch;
  using Block = QueryBlock<Element, DEPTH, VALUES, 1, Operand::kParts == 1 ? 2 : 1, kMore>;
};

template <typename Element, int DEPTH, int VALUES>
struct QueryGradient : QueryGradientShape<Element, DEPTH, VALUES>::Block {
  using Shape = QueryGradientShape<Element, DEPTH, VALUES>;
  using Base = typename Shape::Block;
  using Operand = typename Base::Operand;
  static constexpr int kTile = Base::kTile, kFragments = Base::kFragments, kDiagonalPitch = Shape::kDiagonalPitch;
  using Base::first, Base::head, Base::lane, Base::last, Base::p, Base::row, Base::warp;

  const AttentionGradients& g;
  float dq[1][DEPTH / 8][4] = {};
  float top[2], inverse[2], delta[2], scale[2];  // of rows lane / 4 and these + 8

  LONGVQ_DEVICE QueryGradient(const AttentionGradients& problem, Alignment alignment)
      : Base(problem.forward, alignment), g(problem) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first + row(0, half);
      const int64_t place = head.place(query);
      const bool there = query < last;
      top[half] = there ? p.normalizers[2 * place] : 0.0f;
      inverse[half] = there && !p.laplace ? 1.0f / p.normalizers[2 * place + 1] : 0.0f;
      delta[half] = there ? g.deltas[place] : 0.0f;
      scale[half] = there ? head.scale_of(query) : 0.0f;
    }
  }

  LONGVQ_DEVICE typename Shape::Grads grads() const { return {reinterpret_cast<uint16_t*>(this->more())}; }
  LONGVQ_DEVICE float* diagonals() const { return reinterpret_cast<float*>(this->more() + Shape::Grads::kBytes); }

  LONGVQ_DEVICE void fill_grads(int64_t slice) const {
    const Rows<Element> rows = grads_of<Element>(g, head, slice, this->columns_of_values(slice), this->aligned.grad);
    fill<Operand, kThreads>(
        grads(), rows, [&](int row) { return first + row < last && !head.ignored(first + row) ? first + row : -1; });
  }

  // Gradients of outputs times values: of one slice of columns both are there, others take each other's place.
  LONGVQ_DEVICE void multiply_values(float (&dweights)[1][kFragments][4], const Columns& columns, int number) const {
    for (int64_t slice = 0; slice < p.values; slice += VALUES) {
      if (p.values > VALUES) {
        __syncthreads();
        fill_grads(slice);
        this->fill_values(columns, number, slice);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
      }
      multiply_rows<Operand>(dweights, grads(), warp * 16, this->values(number));
    }
  }

  // Scores, then gradients of scores.
  LONGVQ_DEVICE void differentiate(
      float (&scores)[1][kFragments][4], const float (&dweights)[1][kFragments][4],
      const float (&numbers)[kFragments][2], const Columns& columns) const {
    const bool differ = head.differ(columns, first, last);
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = columns.first + n * 8 + lane % 4 * 2 + c;
        const bool code = columns.kind == Columns::kCodes;
        const bool there = column < columns.last && (code || !head.ignored(column));
        const float number = there ? numbers[n][c] : 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int query = first + row(0, half);
          float& score = scores[0][n][half * 2 + c];
          score *= scale[half];
          if (differ && there) {
            score = head.score_of_key(columns.kind, column - query, score);
          }
          const float dweight = dweights[0][n][half * 2 + c];
          if (number == 0.0f || query >= last) {
            score = 0;
          } else if (p.laplace) {
            score = number * laplace_slope(score) * dweight;
          } else {
            score = number * Operand::exponential(score - top[half]) * inverse[half] * (dweight - delta[half]);
          }
        }
      }
    }
  }

  // All threads: sums the gradients of scores of a tile by offset.
  LONGVQ_DEVICE void add_bias_gradients(const float (&dscores)[1][kFragments][4], const Columns& columns) const {
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        diagonals()[row(0, i / 2) * kDiagonalPitch + n * 8 + lane % 4 * 2 + i % 2] = dscores[0][n][i];
      }
    }
    __syncthreads();
    const int diagonal = static_cast<int>(threadIdx.x) - (Base::kRows - 1);  // column - row
    const int offset = diagonal + columns.first - first;
    if (diagonal < kTile && head.inside(offset)) {
      float sum = 0;
      for (int row = max(0, -diagonal); row < min(Base::kRows, kTile - diagonal); ++row) {
        sum += diagonals()[row * kDiagonalPitch + row + diagonal];
      }
      const int64_t block = (head.batch * p.heads + head.head) * gridDim.x + blockIdx.x;
      g.dbias_of_blocks[block * g.bias_columns + g.bias_skipped + head.bias_entry(offset)] += sum;
    }
  }

  LONGVQ_DEVICE void write(bool far) {
    const int columns = static_cast<int>(far ? p.far_depth : p.near_depth);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first + row(0, half);
      if (query < last) {
        const int64_t place = head.place(query);
        Element* to = static_cast<Element*>(g.dq) + place * (p.far_first + p.far_depth) + (far ? p.far_first : 0);
        const bool pairs = p.far_first % 2 == 0 && p.far_depth % 2 == 0;
#pragma unroll
        for (int n = 0; n < DEPTH / 8; ++n) {
          const float* two = dq[0][n] + half * 2;
          store_columns(to, n * 8 + lane % 4 * 2, columns, pairs, two[0] * scale[half], two[1] * scale[half]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < DEPTH / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dq[0][n][i] = 0;
      }
    }
  }

  LONGVQ_DEVICE void run() {
    fill_grads(0);
    bool far = true;
    const auto visit = [&](const Columns& columns, int number) {
      float scores[1][kFragments][4] = {}, dweights[1][kFragments][4] = {}, numbers[kFragments][2];
      this->load_numbers(numbers, columns);
      multiply_rows<Operand>(scores, this->queries(), warp * 16, this->keys(number));
      multiply_values(dweights, columns, number);
      differentiate(scores, dweights, numbers, columns);
      const bool near = columns.kind == Columns::kInside || columns.kind == Columns::kBoth;
      if (near && g.dbias_of_blocks != nullptr) {
        add_bias_gradients(scores, columns);
      }
      multiply_weights<Operand>(dq, scores, this->keys(number));
    };
    const auto turn = [&] {
      write(true);
      far = false;
    };
    this->past_all_columns(visit, turn);
    // Without far columns of their own all is in the near ones; with them, near ones may have had no key.
    if (far && p.far_first > 0) {
      write(true);
    }
    write(p.far_first == 0);
  }
};

template <typename Element, int DEPTH, int VALUES>
__global__ void __launch_bounds__(kThreads, 2) differentiate_queries(AttentionGradients g, Alignment alignment) {
  QueryGradient<Element, DEPTH, VALUES> gradient(g, alignment);
  if (gradient.has_queries()) {
    gradient.run();
  }
}

}  // namespace
}  // namespace longvq::cuda
