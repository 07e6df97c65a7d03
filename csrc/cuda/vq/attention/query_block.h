// A block of queries that visits its columns tile by tile: what the forward and the gradient of the queries share.
#pragma once

#include "../../common/dispatch.h"
#include "head.h"

namespace longvq::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

// Columns in a tile: fewer with three terms, because each term takes registers.
template <typename Operand>
constexpr int kTileOf = Operand::kTerms == 1 ? 32 : 16;

// The number of columns of values in the slice of at most VALUE_DIM columns that begins at column `slice`.
template <int VALUE_DIM>
LONGVQ_DEVICE int columns_of_slice(const Attention& p, int64_t slice) {
  return static_cast<int>(min(p.value_dim - slice, int64_t{VALUE_DIM}));
}

// Returns call(Constant<HEAD_DIM>, Constant<VALUE_DIM>) for the tiles of a problem: its padded head_dim, and its padded
// value_dim or slices of 128 columns of it.
template <typename Call>
int for_tile_sizes(const Attention& p, const Call& call) {
  return for_padded_columns<128>(p.codebook.columns, [&](auto head_dim) {
    return for_padded_columns<128>(
        p.value_dim < 128 ? p.value_dim : 128, [&](auto value_dim) { return call(head_dim, value_dim); });
  });
}

// The queries of one block of threads: MTILES times 16 for each warp, and one slice of VALUE_DIM columns of values.
// Shared memory holds the queries, EXTRA_BYTES for derived structs, and BUFFERS times the keys and values of a tile.
template <typename Element, int HEAD_DIM, int VALUE_DIM, int MTILES, int BUFFERS, size_t EXTRA_BYTES>
struct QueryBlock {
  using Operand = typename OperandOf<Element>::type;
  static constexpr int kMTiles = MTILES, kRows = 16 * MTILES * kWarps, kBuffers = BUFFERS;
  static constexpr int kTile = kTileOf<Operand>, kFragments = kTile / 8;
  using Queries = Tile<kRows, HEAD_DIM, Operand::kTerms>;
  using Keys = Tile<kTile, HEAD_DIM, Operand::kTerms>;
  using Values = Tile<kTile, VALUE_DIM, Operand::kTerms>;
  static constexpr size_t kBytes = Queries::kBytes + EXTRA_BYTES + BUFFERS * (Keys::kBytes + Values::kBytes);

  const Attention& p;
  Alignment aligned;
  Head head;
  int first_value, first, last, warp, lane;

  LONGVQ_DEVICE QueryBlock(const Attention& problem, Alignment alignment)
      : p(problem), aligned(alignment), head(problem) {
    // The grid has one row for each head and slice of values; or one for each head, whose blocks visit all slices.
    const int heads = static_cast<int>(p.heads), slices = static_cast<int>(gridDim.y) / heads;
    const Piece piece = piece_of(p, kRows, blockIdx.x, blockIdx.z);
    head.enter(piece.sequence);
    head.head = static_cast<int>(blockIdx.y) / slices;
    head.kv_head = head.head / (heads / static_cast<int>(p.kv_heads));
    first_value = static_cast<int>(blockIdx.y) % slices * VALUE_DIM;
    first = static_cast<int>(piece.index) * kRows;
    last = min(first + kRows, head.length);
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
  }

  LONGVQ_DEVICE bool has_queries() const { return first < last; }

  LONGVQ_DEVICE Queries queries() const { return {reinterpret_cast<uint16_t*>(shared_memory())}; }
  LONGVQ_DEVICE char* extra() const { return shared_memory() + Queries::kBytes; }
  LONGVQ_DEVICE char* buffer(int index) const {
    return extra() + EXTRA_BYTES + index % BUFFERS * (Keys::kBytes + Values::kBytes);
  }
  LONGVQ_DEVICE Keys keys(int index) const { return {reinterpret_cast<uint16_t*>(buffer(index))}; }
  LONGVQ_DEVICE Values values(int index) const { return {reinterpret_cast<uint16_t*>(buffer(index) + Keys::kBytes)}; }
  LONGVQ_DEVICE int row(int m, int half) const { return (warp * MTILES + m) * 16 + lane / 4 + half * 8; }

  // The number of keys that each column of a tile stands for: the counts of codes, 1 for keys. Called before the
  // products, which don't wait for these loads. The counts of padding codes are undefined.
  LONGVQ_DEVICE void load_counts(float (&counts)[kFragments][2], const ColumnRange& columns) const {
    const float* from = head.counts(first) + columns.first + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
      TwoFloats pair{1, 1};
      if (columns.kind == ColumnRange::kCodes) {
        pair = *reinterpret_cast<const TwoFloats*>(from + n * 8);
      }
      counts[n][0] = pair.first, counts[n][1] = pair.second;
    }
  }

  LONGVQ_DEVICE void fill_queries(const Rows<Element>& rows) const {
    fill<Operand, kThreads>(queries(), rows, [&](int row) { return first + row < last ? first + row : -1; });
  }

  LONGVQ_DEVICE void fill_columns(const ColumnRange& columns, int index) const {
    const auto row_of = [&](int row) { return columns.first + row < columns.last ? columns.first + row : -1; };
    if (columns.kind == ColumnRange::kInside) {
      fill<Operand, kThreads>(keys(index), head.keys<Element>(aligned), row_of);
    } else {
      const uint16_t* terms = head.codewords<Operand::kTerms, HEAD_DIM>();
      fill_packed<kThreads>(keys(index), terms, padded_codes(p.codebook.num_codes), [&](int row) {
        const int column = row_of(row);
        return column < 0 || columns.kind == ColumnRange::kCodes ? column : head.code_of(column);
      });
    }
    fill_values(columns, index, first_value);
  }

  // Loads the values of a tile, or the means of its codes: the columns from `slice`.
  LONGVQ_DEVICE void fill_values(const ColumnRange& columns, int index, int64_t slice) const {
    const int count = columns_of_slice<VALUE_DIM>(p, slice);
    const auto rows = columns.kind == ColumnRange::kCodes ? head.means<Element>(first, slice, count)
                                                          : head.values<Element>(slice, count, aligned);
    fill<Operand, kThreads>(
        values(index), rows, [&](int row) { return columns.first + row < columns.last ? columns.first + row : -1; });
  }

  // Calls visit(columns, index) for every tile, once the tile is in shared memory. With has_far_qk, calls
  // switch_to_near() once, before the first tile inside the window, which needs the near queries.
  template <typename Visit, typename SwitchToNear>
  LONGVQ_DEVICE void for_each_column_tile(const Visit& visit, const SwitchToNear& switch_to_near) {
    const ColumnTiles tiles(p, first, last, head.length);
    const int count = tiles.count(kTile);
    bool far = true;
    // Only one kind of queries may be copied at a time: both use the same shared memory. (Two calls with constant
    // arguments: a choice between two Rows would take more registers in the whole loop.)
    if (!p.has_far_qk || tiles.at(0, kTile).kind != ColumnRange::kInside) {
      fill_queries(head.far_queries<Element>(aligned));
    } else {
      fill_queries(head.queries<Element>(aligned));
    }
    fill_columns(tiles.at(0, kTile), 0);
    commit_copies();
    for (int index = 0; index < count; ++index) {
      const ColumnRange columns = tiles.at(index, kTile);
      hide_from_optimizer(head.batch), hide_from_optimizer(head.start), hide_from_optimizer(head.kv_head),
          hide_from_optimizer(lane);  // so that addresses are computed for each tile instead of kept in registers
      if (BUFFERS == 2 && index + 1 < count) {
        fill_columns(tiles.at(index + 1, kTile), index + 1);
      }
      commit_copies();  // also an empty group: the newest group always belongs to the next tile
      if (far && columns.kind == ColumnRange::kInside && p.has_far_qk) {
        far = false;  // all threads have finished their products with the far queries
        switch_to_near();
        if (index > 0) {
          fill_queries(head.queries<Element>(aligned));
          commit_copies();
        }
        wait_for_copies<0>();
      } else {
        wait_for_copies<BUFFERS - 1>();
      }
      __syncthreads();
      visit(columns, index);
      __syncthreads();
      if (BUFFERS == 1 && index + 1 < count) {
        fill_columns(tiles.at(index + 1, kTile), index + 1);
        commit_copies();
      }
    }
  }
};

}  // namespace
}  // namespace longvq::cuda
