// The gradient of the queries. A block visits the same columns as the forward and computes the weights again from the
// saved normalizers.
//
// The gradient of the bias: in every tile, one thread sums one offset. Every block adds to a row of its own, so there
// are no atomics.
#pragma once

#include "query_block.h"

namespace longvq::cuda {
namespace {

template <typename Element, int HEAD_DIM, int VALUE_DIM>
struct QueryGradientShape {
  using Operand = typename OperandOf<Element>::type;
  using Grads = Tile<16 * kWarps, VALUE_DIM, Operand::kTerms>;
  static constexpr int kDiagonalPitch = kTileOf<Operand> + 1;
  static constexpr size_t kExtraBytes = Grads::kBytes + sizeof(float) * 16 * kWarps * kDiagonalPitch;
  using Block = QueryBlock<Element, HEAD_DIM, VALUE_DIM, 1, Operand::kTerms == 1 ? 2 : 1, kExtraBytes>;
};

template <typename Element, int HEAD_DIM, int VALUE_DIM>
struct QueryGradient : QueryGradientShape<Element, HEAD_DIM, VALUE_DIM>::Block {
  using Shape = QueryGradientShape<Element, HEAD_DIM, VALUE_DIM>;
  using Base = typename Shape::Block;
  using Operand = typename Base::Operand;
  static constexpr int kTile = Base::kTile, kFragments = Base::kFragments, kDiagonalPitch = Shape::kDiagonalPitch;
  using Base::first, Base::head, Base::lane, Base::last, Base::p, Base::row, Base::warp;

  const AttentionGradients& g;
  float dq[1][HEAD_DIM / 8][4] = {};
  float row_max[2], inverse_sum[2], delta[2], scale[2];  // for rows lane / 4 and lane / 4 + 8

  LONGVQ_DEVICE QueryGradient(const AttentionGradients& problem, Alignment alignment)
      : Base(problem.forward, alignment), g(problem) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first + row(0, half);
      const int64_t index = head.index_of_query(query);
      const bool valid = query < last;
      row_max[half] = valid ? p.normalizers[2 * index] : 0.0f;
      inverse_sum[half] = valid && !p.laplace() ? 1.0f / p.normalizers[2 * index + 1] : 0.0f;
      delta[half] = valid ? g.deltas[index] : 0.0f;
      scale[half] = valid ? head.scale_of(query) : 0.0f;
    }
  }

  LONGVQ_DEVICE typename Shape::Grads grads() const { return {reinterpret_cast<uint16_t*>(this->extra())}; }
  LONGVQ_DEVICE float* diagonals() const { return reinterpret_cast<float*>(this->extra() + Shape::Grads::kBytes); }

  LONGVQ_DEVICE void fill_grads(int64_t slice) const {
    const auto rows = head.template grads<Element>(g, slice, columns_of_slice<VALUE_DIM>(p, slice), this->aligned);
    fill<Operand, kThreads>(
        grads(), rows, [&](int row) { return first + row < last && !head.ignored(first + row) ? first + row : -1; });
  }

  // dweights += output gradients · valuesᵀ. A single slice of columns is in shared memory already; several slices are
  // loaded one after the other.
  LONGVQ_DEVICE void multiply_values(float (&dweights)[1][kFragments][4], const ColumnRange& columns, int index) const {
    for (int64_t slice = 0; slice < p.value_dim; slice += VALUE_DIM) {
      if (p.value_dim > VALUE_DIM) {
        __syncthreads();
        fill_grads(slice);
        this->fill_values(columns, index, slice);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
      }
      multiply_rows<Operand>(dweights, grads(), warp * 16, this->values(index));
    }
  }

  // Turns the products in `scores` into gradients of scores.
  LONGVQ_DEVICE void differentiate(
      float (&scores)[1][kFragments][4], const float (&dweights)[1][kFragments][4],
      const float (&counts)[kFragments][2], const ColumnRange& columns) const {
    const bool needs_pair_scores = head.needs_pair_scores(columns, first, last);
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = columns.first + n * 8 + lane % 4 * 2 + c;
        const bool code = columns.kind == ColumnRange::kCodes;
        const bool valid = column < columns.last && (code || !head.ignored(column));
        const float count = valid ? counts[n][c] : 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int query = first + row(0, half);
          float& score = scores[0][n][half * 2 + c];
          score *= scale[half];
          if (needs_pair_scores && valid) {
            score = head.score_of_key(columns.kind, column - query, score);
          }
          const float dweight = dweights[0][n][half * 2 + c];
          if (count == 0.0f || query >= last) {
            score = 0;
          } else if (p.laplace()) {
            score = count * laplace_slope(score) * dweight;
          } else {
            score = count * Operand::exponential(score - row_max[half]) * inverse_sum[half] * (dweight - delta[half]);
          }
        }
      }
    }
  }

  // Sums the gradients of scores of a tile by offset. All threads of the block call this.
  LONGVQ_DEVICE void add_bias_gradients(const float (&dscores)[1][kFragments][4], const ColumnRange& columns) const {
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
      g.dbias_per_block[block * g.bias_columns + g.bias_skipped + head.bias_entry(offset)] += sum;
    }
  }

  // Writes the sums to dq or dfar_q, and clears them.
  LONGVQ_DEVICE void write(void* array, int64_t head_dim) {
    const int columns = static_cast<int>(head_dim);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first + row(0, half);
      if (query < last) {
        const int64_t index = head.index_of_query(query);
        Element* to = static_cast<Element*>(array) + index * columns;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n) {
          const float* two = dq[0][n] + half * 2;
          store_columns(
              to, n * 8 + lane % 4 * 2, columns, columns % 2 == 0, two[0] * scale[half], two[1] * scale[half]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dq[0][n][i] = 0;
      }
    }
  }

  LONGVQ_DEVICE void run() {
    fill_grads(0);
    bool far = true;
    const auto visit = [&](const ColumnRange& columns, int index) {
      float scores[1][kFragments][4] = {}, dweights[1][kFragments][4] = {}, counts[kFragments][2];
      this->load_counts(counts, columns);
      multiply_rows<Operand>(scores, this->queries(), warp * 16, this->keys(index));
      multiply_values(dweights, columns, index);
      differentiate(scores, dweights, counts, columns);
      const bool near = columns.kind == ColumnRange::kInside || columns.kind == ColumnRange::kBoth;
      if (near && g.dbias_per_block != nullptr) {
        add_bias_gradients(scores, columns);
      }
      multiply_weights<Operand>(dq, scores, this->keys(index));
    };
    const auto switch_to_near = [&] {
      write(g.dfar_q, p.far_head_dim);
      far = false;
    };
    this->for_each_column_tile(visit, switch_to_near);
    if (far && p.has_far_qk) {  // no tile was inside the window
      write(g.dfar_q, p.far_head_dim);
    }
    write(g.dq, p.head_dim);
  }
};

template <typename Element, int HEAD_DIM, int VALUE_DIM>
__global__ void __launch_bounds__(kThreads, 2) differentiate_queries(AttentionGradients g, Alignment alignment) {
  QueryGradient<Element, HEAD_DIM, VALUE_DIM> gradient(g, alignment);
  if (gradient.has_queries()) {
    gradient.run();
  }
}

}  // namespace
}  // namespace longvq::cuda
