// Attention over quantised keys, forward: a block of queries past the codes with their far field, then past the keys
// near it, with a running softmax. See docs/kernels.md.
#pragma once

#include <initializer_list>

#include "attention_columns.h"
#include "tile.h"

namespace longvq::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32, kTile = 32;  // columns at a time

template <typename Element, int DEPTH, int VALUES>
struct Shape {
  using Operand = typename OperandOf<Element>::type;
  // Rows of 16 queries for each warp: twice as many halve what is read from shared memory for each product, but take
  // registers and, in three parts, shared memory.
  static constexpr int kMTiles = Operand::kParts == 1 && DEPTH <= 128 ? 2 : 1;
  static constexpr int kRows = 16 * kMTiles * kWarps;
  static constexpr int kBuffers = Operand::kParts == 1 || DEPTH <= 64 ? 2 : 1;
  using Queries = Tile<kRows, DEPTH, Operand::kParts>;
  using Keys = Tile<kTile, DEPTH, Operand::kParts>;
  using Values = Tile<kTile, VALUES, Operand::kParts>;
  static constexpr size_t kBytes = Queries::kBytes + kBuffers * (Keys::kBytes + Values::kBytes);
};

// Mega's attention function, ½ (1 + erf((x − μ) / (σ √2))) with μ = √½, σ = √(1 / 4π).
LONGVQ_DEVICE float laplace(float x) { return 0.5f * erfcf((0.70710678f - x) * 2.50662827f); }

template <typename Element, int DEPTH, int VALUES>
struct Forward {
  using S = Shape<Element, DEPTH, VALUES>;
  using Operand = typename S::Operand;
  static constexpr int kFragments = kTile / 8;

  const Attention& p;
  bool q_aligned, k_aligned, v_aligned;
  int64_t batch, head, kv_head, first_value, first, last;
  int warp, lane;
  float out[S::kMTiles][VALUES / 8][4] = {};
  float top[S::kMTiles][2], total[S::kMTiles][2] = {};  // of rows lane / 4 and these + 8

  LONGVQ_DEVICE explicit Forward(const Attention& problem, unsigned alignment) : p(problem) {
    q_aligned = alignment & 1, k_aligned = alignment & 2, v_aligned = alignment & 4;
    const int64_t slices = divide_up(p.values, VALUES);
    batch = blockIdx.z;
    head = blockIdx.y / slices;
    kv_head = head / (p.heads / p.kv_heads);
    first_value = blockIdx.y % slices * VALUES;
    first = static_cast<int64_t>(blockIdx.x) * S::kRows;
    last = min(first + S::kRows, p.length);
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    for (int m = 0; m < S::kMTiles; ++m) {
      top[m][0] = top[m][1] = -INFINITY;
    }
  }

  LONGVQ_DEVICE typename S::Queries queries() const { return {reinterpret_cast<uint16_t*>(shared_memory())}; }
  LONGVQ_DEVICE char* buffer(int number) const {
    return shared_memory() + S::Queries::kBytes + number % S::kBuffers * (S::Keys::kBytes + S::Values::kBytes);
  }
  LONGVQ_DEVICE typename S::Keys keys(int number) const { return {reinterpret_cast<uint16_t*>(buffer(number))}; }
  LONGVQ_DEVICE typename S::Values values(int number) const {
    return {reinterpret_cast<uint16_t*>(buffer(number) + S::Keys::kBytes)};
  }
  LONGVQ_DEVICE int columns_of_values() const { return static_cast<int>(min(p.values - first_value, int64_t{VALUES})); }

  LONGVQ_DEVICE void fill_queries(bool far) const {
    const auto* q = static_cast<const Element*>(p.q) + batch * p.q_batch + head * p.q_head + (far ? p.far_first : 0);
    const Rows<Element> rows{q, p.q_length, static_cast<int>(far ? p.far_depth : p.near_depth), q_aligned};
    fill<Operand, kThreads>(queries(), rows, [&](int row) { return first + row < last ? first + row : -1; });
  }

  LONGVQ_DEVICE int64_t code_of(int64_t key) const {
    return p.code_of_key[(batch * p.kv_heads + kv_head) * p.length + key];
  }
  LONGVQ_DEVICE bool ignored(int64_t key) const {
    return p.ignored != nullptr && p.ignored[batch * p.ignored_batch + key * p.ignored_length] != 0;
  }

  LONGVQ_DEVICE void fill_columns(const Columns& columns, int number) const {
    const int64_t padded = padded_codes(p.codebook.codes);
    if (columns.kind == Columns::kInside) {
      const auto* k = static_cast<const Element*>(p.k) + batch * p.k_batch + kv_head * p.k_head;
      const Rows<Element> rows{k, p.k_length, static_cast<int>(p.near_depth), k_aligned};
      fill<Operand, kThreads>(keys(number), rows, [&](int row) {
        return columns.first + row < columns.last ? columns.first + row : -1;
      });
    } else {
      const uint16_t* parts = p.codebook.parts + kv_head * Operand::kParts * padded * DEPTH;
      fill_packed<kThreads>(keys(number), parts, padded, [&](int row) {
        const int64_t column = columns.first + row;
        return column >= columns.last ? -1 : columns.kind == Columns::kCodes ? column : code_of(column);
      });
    }
    const auto row_of = [&](int row) { return columns.first + row < columns.last ? columns.first + row : -1; };
    if (columns.kind == Columns::kCodes) {
      const int64_t pitch = value_pitch(p.values);
      const auto* means = static_cast<const Element*>(p.means) + far_field() * padded * pitch + first_value;
      fill<Operand, kThreads>(values(number), Rows<Element>{means, pitch, columns_of_values(), true}, row_of);
    } else {
      const auto* v = static_cast<const Element*>(p.v) + batch * p.v_batch + kv_head * p.v_head + first_value;
      fill<Operand, kThreads>(values(number), Rows<Element>{v, p.v_length, columns_of_values(), v_aligned}, row_of);
    }
  }

  LONGVQ_DEVICE int64_t far_field() const {
    const int64_t field = p.far_fields == 1 ? 0 : first / kFarBlock;
    return (batch * p.kv_heads + kv_head) * p.far_fields + field;
  }

  // The score of a pair of query and key, or -infinity where it is not allowed or not of this kind.
  LONGVQ_DEVICE float score_of_key(Columns::Kind kind, int64_t query, int64_t key, float score) const {
    const int64_t offset = key - query;
    const bool inside = offset < p.window && -offset < p.window && (!p.causal || offset <= 0);
    if ((p.causal && offset > 0) || (inside ? kind == Columns::kOutside : kind == Columns::kInside)) {
      return -INFINITY;
    }
    if (inside && p.bias != nullptr) {
      const int64_t entry = p.causal ? -offset : offset + p.window - 1;
      score += p.bias[head * p.bias_head + entry * p.bias_offset];
    }
    return score;
  }

  // Products become scores: scaled, with what is added to those of a code or a pair.
  LONGVQ_DEVICE void finish_scores(
      float (&scores)[S::kMTiles][kFragments][4], const Columns& columns, const float (&scale)[S::kMTiles][2],
      float (&numbers)[kFragments][2]) const {
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int64_t column = columns.first + n * 8 + lane % 4 * 2 + c;
        const bool there = column < columns.last;
        const bool code = columns.kind == Columns::kCodes;
        numbers[n][c] = 1;
        float add = there && (code || !ignored(column)) ? 0.0f : -INFINITY;
        if (there && code) {
          const float number = p.numbers[far_field() * padded_codes(p.codebook.codes) + column];
          numbers[n][c] = number;
          add = p.laplace ? 0.0f : number;
        }
#pragma unroll
        for (int m = 0; m < S::kMTiles; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& score = scores[m][n][half * 2 + c];
            score = score * scale[m][half] + add;
            if (!code) {
              score = score_of_key(columns.kind, first + row(m, half), column, score);
            }
          }
        }
      }
    }
  }

  LONGVQ_DEVICE int row(int m, int half) const { return (warp * S::kMTiles + m) * 16 + lane / 4 + half * 8; }

  // Scores become weights under a maximum that may have risen, for which what was summed before is scaled down.
  LONGVQ_DEVICE void soften(float (&scores)[S::kMTiles][kFragments][4]) {
#pragma unroll
    for (int m = 0; m < S::kMTiles; ++m) {
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
#pragma unroll
        for (int n = 0; n < VALUES / 8; ++n) {
          out[m][n][half * 2] *= shrink;
          out[m][n][half * 2 + 1] *= shrink;
        }
      }
    }
  }

  LONGVQ_DEVICE void weigh_by_laplace(
      float (&scores)[S::kMTiles][kFragments][4], const float (&numbers)[kFragments][2]) const {
#pragma unroll
    for (int m = 0; m < S::kMTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kFragments; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[m][n][i] = numbers[n][i % 2] * laplace(scores[m][n][i]);
        }
      }
    }
  }

  LONGVQ_DEVICE void write() {
#pragma unroll
    for (int m = 0; m < S::kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = total[m][half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        const int64_t query = first + row(m, half);
        if (query >= last) {
          continue;
        }
        const int64_t place = (batch * p.heads + head) * p.length + query;
        sum = sum == 0.0f ? 1.0f : sum;  // no allowed key at all
        if (first_value == 0 && lane % 4 == 0) {
          p.normalizers[place * 2] = p.laplace || top[m][half] == -INFINITY ? 0.0f : top[m][half];
          p.normalizers[place * 2 + 1] = p.laplace ? 0.0f : sum;
        }
        const float factor = ignored(query) ? 0.0f : p.laplace ? 1.0f : 1.0f / sum;
        Element* to = static_cast<Element*>(p.out) + place * p.values + first_value;
#pragma unroll
        for (int n = 0; n < VALUES / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int column = n * 8 + lane % 4 * 2 + c;
            if (column < columns_of_values()) {
              store(to + column, factor == 0.0f ? 0.0f : out[m][n][half * 2 + c] * factor);
            }
          }
        }
      }
    }
  }

  LONGVQ_DEVICE void run() {
    const ColumnTiles tiles(p, first, last, kTile);
    const int count = tiles.count();
    float scale[S::kMTiles][2];
#pragma unroll
    for (int m = 0; m < S::kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t query = first + row(m, half);
        scale[m][half] = p.laplace && query < last ? p.units[batch * p.length + query] : p.scale;
      }
    }
    bool far = true;
    fill_queries(far);
    fill_columns(tiles.at(0, kTile), 0);
    commit_copies();
    for (int number = 0; number < count; ++number) {
      const Columns columns = tiles.at(number, kTile);
      if (S::kBuffers == 2 && number + 1 < count) {
        fill_columns(tiles.at(number + 1, kTile), number + 1);
      }
      commit_copies();  // an empty group too: the newest one is always that of the next tile
      if (far && columns.kind == Columns::kInside && p.far_first > 0) {
        far = false;  // all threads are past the products with the queries before
        fill_queries(far);
        commit_copies();
        wait_for_copies<0>();
      } else {
        wait_for_copies<S::kBuffers - 1>();
      }
      __syncthreads();
      float scores[S::kMTiles][kFragments][4] = {}, numbers[kFragments][2];
      multiply_rows<Operand>(scores, queries(), warp * S::kMTiles * 16, keys(number));
      finish_scores(scores, columns, scale, numbers);
      if (p.laplace) {
        weigh_by_laplace(scores, numbers);
      } else {
        soften(scores);
      }
      multiply_weights<Operand>(out, scores, values(number));
      __syncthreads();
      if (S::kBuffers == 1 && number + 1 < count) {
        fill_columns(tiles.at(number + 1, kTile), number + 1);
        commit_copies();
      }
    }
    write();
  }
};

template <typename Element, int DEPTH, int VALUES>
__global__ void __launch_bounds__(kThreads, 2) attend(Attention p, unsigned alignment) {
  Forward<Element, DEPTH, VALUES>(p, alignment).run();
}

template <typename Element>
int attend_as(const Attention& p, void* stream) {
  const unsigned alignment = aligned(p.q, p.type, {p.q_batch, p.q_head, p.q_length, p.far_first}) |
                             aligned(p.k, p.type, {p.k_batch, p.k_head, p.k_length}) << 1 |
                             aligned(p.v, p.type, {p.v_batch, p.v_head, p.v_length}) << 2;
  return for_depth(p.codebook.columns, [&](auto depth) {
    return for_depth(p.values < 128 ? p.values : 128, [&](auto values) {
      if constexpr (values.value == 256) {
        return kNotCovered;
      } else {
        using S = Shape<Element, depth.value, values.value>;
        const dim3 grid(
            static_cast<unsigned>(divide_up(p.length, S::kRows)),
            static_cast<unsigned>(p.heads * divide_up(p.values, values.value)), static_cast<unsigned>(p.batch));
        return launch(
            attend<Element, depth.value, values.value>, grid, kThreads, S::kBytes, stream, p, alignment);
      }
    });
  });
}

}  // namespace
}  // namespace longvq::cuda
