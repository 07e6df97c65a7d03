// A block of codes, or of keys, and the tiles of queries it goes past: what gradients of codewords, keys and values
// share. Every sum has one owner: no atomics, the same result every time.
#pragma once

#include "query_block.h"

namespace longvq::cuda {
namespace {

// What a kernel makes. Where values have more columns than registers hold, that is either the gradients of keys, or of
// one slice of the values.
enum Makes { kKeysAndValues, kKeysOnly, kValuesOnly };

// 64 codes or keys, 16 a warp, and tiles of queries with the gradients of their outputs.
template <typename Element, int DEPTH, int VALUES, Makes MAKES>
struct KeyBlock {
  using Operand = typename OperandOf<Element>::type;
  static constexpr int kRows = 16 * kWarps, kBuffers = Operand::kParts == 1 ? 2 : 1, kValuePitch = VALUES + 4;
  static constexpr int kTile = kTileOf<Operand>, kFragments = kTile / 8;
  using Keys = Tile<kRows, DEPTH, Operand::kParts>;
  using Values = Tile<kRows, VALUES, Operand::kParts>;
  using Queries = Tile<kTile, DEPTH, Operand::kParts>;
  using Grads = Tile<kTile, VALUES, Operand::kParts>;
  // Sums of values on their way to the keys take the place of queries, of which none is awaited then.
  static constexpr size_t kStage = sizeof(float) * kRows * kValuePitch;
  static constexpr size_t kStream = kBuffers * (Queries::kBytes + Grads::kBytes);
  static constexpr size_t kBytes = Keys::kBytes + Values::kBytes + (kStage > kStream ? kStage : kStream);
  using Pairs = float[1][kFragments][4];
  // What each of many keys of a code weighs may be too small for a float16: times a power of two while it is one.
  static constexpr float kWeightScale = std::is_same_v<Operand, OneHalf> ? 4096.0f : 1.0f;

  const AttentionGradients& g;
  const Attention& p;
  Alignment aligned;
  Head head;
  int first;        // code or key
  int first_value;  // of the slice of columns
  int warp, lane;
  float dkeys[1][DEPTH / 8][4] = {}, dvalues[1][VALUES / 8][4] = {};

  LONGVQ_DEVICE KeyBlock(const AttentionGradients& problem, Alignment alignment)
      : g(problem), p(problem.forward), aligned(alignment), head(problem.forward) {
    const int slices = static_cast<int>(gridDim.y) / static_cast<int>(p.kv_heads);
    head.kv_head = static_cast<int>(blockIdx.y) / slices;
    first_value = static_cast<int>(blockIdx.y) % slices * VALUES;
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
  }

  LONGVQ_DEVICE char* place(size_t offset) const { return shared_memory() + offset; }
  LONGVQ_DEVICE Keys keys() const { return {reinterpret_cast<uint16_t*>(place(0))}; }
  LONGVQ_DEVICE Values values() const { return {reinterpret_cast<uint16_t*>(place(Keys::kBytes))}; }
  LONGVQ_DEVICE float* stage(int row) const {
    return reinterpret_cast<float*>(place(Keys::kBytes + Values::kBytes)) + row * kValuePitch;
  }
  LONGVQ_DEVICE char* buffer(int number) const {
    return place(Keys::kBytes + Values::kBytes) + number % kBuffers * (Queries::kBytes + Grads::kBytes);
  }
  LONGVQ_DEVICE Queries queries(int number) const { return {reinterpret_cast<uint16_t*>(buffer(number))}; }
  LONGVQ_DEVICE Grads grads(int number) const {
    return {reinterpret_cast<uint16_t*>(buffer(number) + Queries::kBytes)};
  }
  LONGVQ_DEVICE int row(int half) const { return warp * 16 + lane / 4 + half * 8; }
  LONGVQ_DEVICE int columns_of_values(int64_t slice) const {
    return static_cast<int>(min(p.values - slice, int64_t{VALUES}));
  }
  LONGVQ_DEVICE int group() const { return static_cast<int>(p.heads / p.kv_heads); }

  template <int NTILES>
  LONGVQ_DEVICE static void clear(float (&values)[1][NTILES][4]) {
#pragma unroll
    for (int i = 0; i < NTILES * 4; ++i) {
      values[0][i / 4][i % 4] = 0;
    }
  }

  LONGVQ_DEVICE void fill_grads(const Head& of, int64_t begin, int64_t end, int number, int64_t slice) const {
    const Rows<Element> rows = grads_of<Element>(g, of, slice, columns_of_values(slice), aligned.grad);
    fill<Operand, kThreads>(grads(number), rows, [&](int row) {
      return begin + row < end && !head.ignored(begin + row) ? begin + row : -1;
    });
  }

  // Calls visit(head, first query, tile's number) for the queries begin .. end of all heads of the group.
  template <typename Visit>
  LONGVQ_DEVICE void past_queries(int64_t begin, int64_t end, bool far, const Visit& visit) {
    const int tiles = end > begin ? static_cast<int>(divide_up(end - begin, kTile)) : 0;
    const int count = tiles * group();
    const auto at = [&](int number) {
      Head of = head;
      of.head = head.kv_head * group() + number / tiles;
      return of;
    };
    const auto fill_tile = [&](int number) {
      const Head of = at(number);
      const int64_t from = begin + static_cast<int64_t>(number % tiles) * kTile;
      fill<Operand, kThreads>(queries(number), of.queries<Element>(far, aligned.q), [&](int row) {
        return from + row < end ? from + row : -1;
      });
      fill_grads(of, from, end, number, first_value);
    };
    __syncthreads();
    if (count > 0) {
      fill_tile(0);
    }
    commit_copies();
    for (int number = 0; number < count; ++number) {
      forget(head.batch), forget(head.start), forget(head.kv_head), forget(lane);  // addresses are made again
      if (kBuffers == 2 && number + 1 < count) {
        fill_tile(number + 1);
      }
      commit_copies();
      wait_for_copies<kBuffers - 1>();
      __syncthreads();
      visit(at(number), begin + static_cast<int64_t>(number % tiles) * kTile, number);
      __syncthreads();
      if (kBuffers == 1 && number + 1 < count) {
        fill_tile(number + 1);
        commit_copies();
      }
    }
    wait_for_copies<0>();
    __syncthreads();
  }

  // For a tile of queries: what they weigh a key of these rows with, and the gradients of their scores. `numbers`: how
  // many keys the rows of this lane stand for; score_of(query, row, score): -infinity where the pair is not allowed;
  // fill_values(slice): puts other columns of the values into place.
  template <typename Score, typename FillValues>
  LONGVQ_DEVICE void weigh(
      Pairs& weights, Pairs& dscores, const Head& of, int64_t begin, int64_t end, int tile, const float (&numbers)[2],
      const Score& score_of, const FillValues& fill_values) const {
    multiply_rows<Operand>(weights, keys(), warp * 16, queries(tile));
    for (int64_t slice = 0; MAKES != kValuesOnly && slice < p.values; slice += VALUES) {
      if (p.values > VALUES) {
        __syncthreads();
        fill_grads(of, begin, end, tile, slice);
        fill_values(slice);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
      }
      multiply_rows<Operand>(dscores, values(), warp * 16, grads(tile));
    }
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int64_t query = begin + n * 8 + lane % 4 * 2 + c;
        const bool there = query < end;
        const int64_t at = of.place(query);
        const float top = there ? p.normalizers[2 * at] : 0.0f;
        const float inverse = there && !p.laplace ? 1.0f / p.normalizers[2 * at + 1] : 0.0f;
        const float delta = there ? g.deltas[at] : 0.0f, scale = there ? of.scale_of(query) : 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& weight = weights[0][n][half * 2 + c];
          float& dscore = dscores[0][n][half * 2 + c];
          const float keys_of_row = there ? numbers[half] : 0.0f;
          const float score = keys_of_row > 0 ? score_of(query, row(half), weight * scale) : -INFINITY;
          if (score == -INFINITY) {
            weight = dscore = 0;
          } else if (p.laplace) {
            weight = laplace(score);
            dscore *= scale * keys_of_row * laplace_slope(score);
          } else {
            weight = Operand::exponential(score - top) * inverse;
            dscore = scale * keys_of_row * weight * (dscore - delta);
          }
          weight *= kWeightScale;
        }
      }
    }
  }

  // Rows of float32, an even number of columns apart if they have an even number, from fragments; to(row) is null where
  // there is none.
  template <int NTILES, typename To>
  LONGVQ_DEVICE void write(
      const float (&from)[1][NTILES][4], int64_t columns, const To& to, float factor = 1.0f) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* out = to(row(half));
      const int there = out == nullptr ? 0 : static_cast<int>(columns);
#pragma unroll
      for (int n = 0; n < NTILES; ++n) {
        const float* two = from[0][n] + half * 2;
        store_columns(out, n * 8 + lane % 4 * 2, there, columns % 2 == 0, two[0] * factor, two[1] * factor);
      }
    }
  }
};

}  // namespace
}  // namespace longvq::cuda
