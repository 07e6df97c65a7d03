// A block of codes, or of keys, that visits queries tile by tile: what the gradients of codewords, keys and values
// share. Every sum has one owner: no atomics, and the same result every time.
#pragma once

#include "query_block.h"

namespace longvq::cuda {
namespace {

// The gradients that a kernel computes. If the registers can't hold both, one kernel computes the gradients of keys,
// and another kernel those of one slice of the values.
enum Outputs { kKeysAndValues, kKeysOnly, kValuesOnly };

// 64 codes or keys, 16 for each warp. Shared memory holds them with their values, and tiles of queries with their
// output gradients.
template <typename Element, int HEAD_DIM, int VALUE_DIM, Outputs OUTPUTS>
struct KeyBlock {
  using Operand = typename OperandOf<Element>::type;
  static constexpr int kRows = 16 * kWarps, kBuffers = Operand::kTerms == 1 ? 2 : 1, kValuePitch = VALUE_DIM + 4;
  static constexpr int kTile = kTileOf<Operand>, kFragments = kTile / 8;
  using Keys = Tile<kRows, HEAD_DIM, Operand::kTerms>;
  using Values = Tile<kRows, VALUE_DIM, Operand::kTerms>;
  using Queries = Tile<kTile, HEAD_DIM, Operand::kTerms>;
  using Grads = Tile<kTile, VALUE_DIM, Operand::kTerms>;
  // CodeGradient stages sums of values in the memory of the queries, when no copy to it is open.
  static constexpr size_t kStage = sizeof(float) * kRows * kValuePitch;
  static constexpr size_t kStream = kBuffers * (Queries::kBytes + Grads::kBytes);
  static constexpr size_t kBytes = Keys::kBytes + Values::kBytes + (kStage > kStream ? kStage : kStream);
  using Pairs = float[1][kFragments][4];
  // A code stands for many keys, so the weight of one key may be too small for float16. Weights are multiplied by this
  // power of two, and the sums are divided by it.
  static constexpr float kWeightScale = std::is_same_v<Operand, OneHalf> ? 4096.0f : 1.0f;

  const AttentionGradients& g;
  const Attention& p;
  Alignment aligned;
  Head head;
  int first;        // the first code or key of the block
  int first_value;  // the first column of the slice of values
  int warp, lane;
  float dkeys[1][HEAD_DIM / 8][4] = {}, dvalues[1][VALUE_DIM / 8][4] = {};

  LONGVQ_DEVICE KeyBlock(const AttentionGradients& problem, Alignment alignment)
      : g(problem), p(problem.forward), aligned(alignment), head(problem.forward) {
    const int slices = static_cast<int>(gridDim.y) / static_cast<int>(p.kv_heads);
    head.kv_head = static_cast<int>(blockIdx.y) / slices;
    first_value = static_cast<int>(blockIdx.y) % slices * VALUE_DIM;
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
  }

  LONGVQ_DEVICE char* shared(size_t offset) const { return shared_memory() + offset; }
  LONGVQ_DEVICE Keys keys() const { return {reinterpret_cast<uint16_t*>(shared(0))}; }
  LONGVQ_DEVICE Values values() const { return {reinterpret_cast<uint16_t*>(shared(Keys::kBytes))}; }
  LONGVQ_DEVICE float* stage(int row) const {
    return reinterpret_cast<float*>(shared(Keys::kBytes + Values::kBytes)) + row * kValuePitch;
  }
  LONGVQ_DEVICE char* buffer(int index) const {
    return shared(Keys::kBytes + Values::kBytes) + index % kBuffers * (Queries::kBytes + Grads::kBytes);
  }
  LONGVQ_DEVICE Queries queries(int index) const { return {reinterpret_cast<uint16_t*>(buffer(index))}; }
  LONGVQ_DEVICE Grads grads(int index) const { return {reinterpret_cast<uint16_t*>(buffer(index) + Queries::kBytes)}; }
  LONGVQ_DEVICE int row(int half) const { return warp * 16 + lane / 4 + half * 8; }
  LONGVQ_DEVICE int group() const { return static_cast<int>(p.heads / p.kv_heads); }

  template <int NTILES>
  LONGVQ_DEVICE static void clear(float (&values)[1][NTILES][4]) {
#pragma unroll
    for (int i = 0; i < NTILES * 4; ++i) {
      values[0][i / 4][i % 4] = 0;
    }
  }

  LONGVQ_DEVICE void fill_grads(const Head& query_head, int64_t begin, int64_t end, int index, int64_t slice) const {
    const auto rows = query_head.template grads<Element>(g, slice, columns_of_slice<VALUE_DIM>(p, slice), aligned);
    fill<Operand, kThreads>(grads(index), rows, [&](int row) {
      return begin + row < end && !head.ignored(begin + row) ? begin + row : -1;
    });
  }

  // Calls visit(query_head, first query, tile index) for the queries begin .. end of all heads of the group. `far`:
  // loads far_q instead of q.
  template <typename Visit>
  LONGVQ_DEVICE void for_each_query_tile(int64_t begin, int64_t end, bool far, const Visit& visit) {
    const int tiles = end > begin ? static_cast<int>(divide_up(end - begin, kTile)) : 0;
    const int count = tiles * group();
    const auto at = [&](int index) {
      Head query_head = head;
      query_head.head = head.kv_head * group() + index / tiles;
      return query_head;
    };
    const auto fill_tile = [&](int index) {
      const Head query_head = at(index);
      const int64_t from = begin + static_cast<int64_t>(index % tiles) * kTile;
      const auto fill_queries = [&](const Rows<Element>& rows) {
        fill<Operand, kThreads>(queries(index), rows, [&](int row) { return from + row < end ? from + row : -1; });
      };
      if (far) {  // two calls, because a choice between two Rows takes more registers
        fill_queries(query_head.template far_queries<Element>(aligned));
      } else {
        fill_queries(query_head.template queries<Element>(aligned));
      }
      fill_grads(query_head, from, end, index, first_value);
    };
    __syncthreads();
    if (count > 0) {
      fill_tile(0);
    }
    commit_copies();
    for (int index = 0; index < count; ++index) {
      hide_from_optimizer(head.batch), hide_from_optimizer(head.start), hide_from_optimizer(head.kv_head),
          hide_from_optimizer(lane);  // so that addresses are computed for each tile instead of kept in registers
      if (kBuffers == 2 && index + 1 < count) {
        fill_tile(index + 1);
      }
      commit_copies();
      wait_for_copies<kBuffers - 1>();
      __syncthreads();
      visit(at(index), begin + static_cast<int64_t>(index % tiles) * kTile, index);
      __syncthreads();
      if (kBuffers == 1 && index + 1 < count) {
        fill_tile(index + 1);
        commit_copies();
      }
    }
    wait_for_copies<0>();
    __syncthreads();
  }

  // For a tile of queries: the weight of one key of each row, and the gradients of the scores. `counts`: the number of
  // keys that each row of this lane stands for. score_of(query, row, score): the final score, −infinity if the pair is
  // not allowed. fill_values(slice): loads the columns of the values from `slice`.
  template <typename Score, typename FillValues>
  LONGVQ_DEVICE void weights_and_dscores(
      Pairs& weights, Pairs& dscores, const Head& query_head, int64_t begin, int64_t end, int tile,
      const float (&counts)[2], const Score& score_of, const FillValues& fill_values) const {
    multiply_rows<Operand>(weights, keys(), warp * 16, queries(tile));
    for (int64_t slice = 0; OUTPUTS != kValuesOnly && slice < p.value_dim; slice += VALUE_DIM) {
      if (p.value_dim > VALUE_DIM) {
        __syncthreads();
        fill_grads(query_head, begin, end, tile, slice);
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
        const bool valid = query < end;
        const int64_t at = query_head.index_of_query(query);
        const float row_max = valid ? p.normalizers[2 * at] : 0.0f;
        const float inverse_sum = valid && !p.laplace() ? 1.0f / p.normalizers[2 * at + 1] : 0.0f;
        const float delta = valid ? g.deltas[at] : 0.0f, scale = valid ? query_head.scale_of(query) : 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& weight = weights[0][n][half * 2 + c];
          float& dscore = dscores[0][n][half * 2 + c];
          const float keys_of_row = valid ? counts[half] : 0.0f;
          const float score = keys_of_row > 0 ? score_of(query, row(half), weight * scale) : -INFINITY;
          if (score == -INFINITY) {
            weight = dscore = 0;
          } else if (p.laplace()) {
            weight = laplace(score);
            dscore *= scale * keys_of_row * laplace_slope(score);
          } else {
            weight = Operand::exponential(score - row_max) * inverse_sum;
            dscore = scale * keys_of_row * weight * (dscore - delta);
          }
          weight *= kWeightScale;
        }
      }
    }
  }

  // Writes fragments, times `factor`, to float32 rows. to(row) points to a row, null where it doesn't exist; rows with
  // an even number of columns are aligned to pairs.
  template <int NTILES, typename To>
  LONGVQ_DEVICE void write(
      const float (&from)[1][NTILES][4], int64_t columns, const To& to, float factor = 1.0f) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* out = to(row(half));
      const int valid = out == nullptr ? 0 : static_cast<int>(columns);
#pragma unroll
      for (int n = 0; n < NTILES; ++n) {
        const float* two = from[0][n] + half * 2;
        store_columns(out, n * 8 + lane % 4 * 2, valid, columns % 2 == 0, two[0] * factor, two[1] * factor);
      }
    }
  }

  // Writes dvalues, the sums of one slice of the values, to the rows row_start(row); null where a row doesn't exist.
  template <typename RowStart>
  LONGVQ_DEVICE void write_values(const RowStart& row_start) const {
    const auto to = [&](int row) {
      float* start = row_start(row);
      return start == nullptr ? nullptr : start + first_value;
    };
    write(dvalues, columns_of_slice<VALUE_DIM>(p, first_value), to, 1 / kWeightScale);
  }
};

}  // namespace
}  // namespace longvq::cuda
