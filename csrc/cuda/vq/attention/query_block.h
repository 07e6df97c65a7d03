// A block of queries and the tiles of columns it goes past: what the forward and the gradient of the queries share.
#pragma once

#include <initializer_list>

#include "../../common/pieces.h"
#include "../../common/tile.h"
#include "column_tiles.h"

namespace longvq::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

// Columns at a time; of numbers in parts fewer, since the parts take registers too.
template <typename Operand>
constexpr int kTileOf = Operand::kParts == 1 ? 32 : 16;

// Whether rows of q, k, v and of the gradient of the output begin at multiples of 16 bytes.
struct Alignment {
  bool q, k, v, grad;
};

inline Alignment alignment_of(const Attention& p) {
  return {
      aligned(p.q, p.type, {p.q_batch, p.q_head, p.q_length, p.far_first}),
      aligned(p.k, p.type, {p.k_batch, p.k_head, p.k_length}), aligned(p.v, p.type, {p.v_batch, p.v_head, p.v_length}),
      false};
}

// One head of one sequence, in which queries and keys are counted.
struct Head {
  const Attention& p;
  // Small, since it lives as long as the products: 32-bit numbers.
  int sequence, batch, head, kv_head;
  int start, length, first_field;  // of the sequence, in its row of the tensors

  LONGVQ_DEVICE explicit Head(const Attention& problem) : p(problem) {}

  LONGVQ_DEVICE void enter(const Sequence& of) {
    sequence = static_cast<int>(of.number), batch = static_cast<int>(of.batch);
    start = static_cast<int>(of.start), length = static_cast<int>(of.length);
    first_field = static_cast<int>(first_far_field(p, of, p.causal, p.all_far()));
  }

  // The place of a query in arrays (batch, heads, length), of a key in those of its heads.
  LONGVQ_DEVICE int64_t place(int64_t query) const { return (batch * p.heads + head) * p.length + start + query; }
  LONGVQ_DEVICE int64_t place_of_key(int64_t key) const {
    return (batch * p.kv_heads + kv_head) * p.length + start + key;
  }

  // Codes that a caller made up must not become addresses.
  LONGVQ_DEVICE int64_t code_of(int64_t key) const {
    const int64_t code = p.code_of_key[place_of_key(key)];
    return min(max(code, int64_t{0}), p.codebook.codes - 1);
  }
  LONGVQ_DEVICE bool ignored(int64_t key) const {
    return p.ignored != nullptr && p.ignored[batch * p.ignored_batch + (start + key) * p.ignored_length] != 0;
  }
  // The far field of a query, counted over everything.
  LONGVQ_DEVICE int64_t far_field(int64_t query) const {
    const int64_t field = p.all_far() ? 0 : query / kFarBlock;
    return (batch * p.kv_heads + kv_head) * p.far_fields + first_field + field;
  }
  // Of all codes in the far field of a query.
  LONGVQ_DEVICE const float* numbers(int64_t query) const {
    return p.numbers + far_field(query) * padded_codes(p.codebook.codes);
  }
  LONGVQ_DEVICE float scale_of(int64_t query) const {
    return p.laplace ? p.units[batch * p.length + start + query] : p.scale;
  }
  // Whether a pair is inside the window, by offset = key - query.
  LONGVQ_DEVICE bool inside(int offset) const {
    const int window = static_cast<int>(p.window);
    return offset < window && -offset < window && (!p.causal || offset <= 0);
  }
  // The entry of the bias for a pair inside the window.
  LONGVQ_DEVICE int bias_entry(int offset) const {
    return p.causal ? -offset : offset + static_cast<int>(p.window) - 1;
  }
  // The score of a pair, or -infinity where it is not allowed or not of this kind.
  LONGVQ_DEVICE float score_of_key(Columns::Kind kind, int offset, float score) const {
    const bool in = inside(offset);
    if ((p.causal && offset > 0) || (in ? kind == Columns::kOutside : kind == Columns::kInside)) {
      return -INFINITY;
    }
    if (in && p.bias != nullptr) {
      score += p.bias[head * p.bias_head + bias_entry(offset) * p.bias_offset];
    }
    return score;
  }

  // Whether some of the pairs of these columns with queries first .. last need score_of_key: of codes none do, nor
  // where all pairs are of their kind, and have no bias.
  LONGVQ_DEVICE bool differ(const Columns& columns, int first, int last) const {
    const int least = columns.first - last + 1, most = columns.last - 1 - first, window = static_cast<int>(p.window);
    const bool all_outside = most <= -window || (!p.causal && least >= window);
    const bool all_inside = inside(least) && inside(most) && p.bias == nullptr;
    return columns.kind != Columns::kCodes && !(all_outside && columns.kind != Columns::kInside) &&
           !(all_inside && columns.kind != Columns::kOutside);
  }

  template <typename Element>
  LONGVQ_DEVICE Rows<Element> queries(bool far, bool rows_aligned) const {
    const auto* q = static_cast<const Element*>(p.q) + batch * p.q_batch + head * p.q_head + start * p.q_length;
    return {q + (far ? p.far_first : 0), p.q_length, static_cast<int>(far ? p.far_depth : p.near_depth), rows_aligned};
  }
  template <typename Element>
  LONGVQ_DEVICE Rows<Element> keys(bool rows_aligned) const {
    const auto* k = static_cast<const Element*>(p.k) + batch * p.k_batch + kv_head * p.k_head + start * p.k_length;
    return {k, p.k_length, static_cast<int>(p.near_depth), rows_aligned};
  }
  template <typename Element>
  LONGVQ_DEVICE Rows<Element> values(int64_t first, int columns, bool rows_aligned) const {
    const auto* v = static_cast<const Element*>(p.v) + batch * p.v_batch + kv_head * p.v_head + start * p.v_length;
    return {v + first, p.v_length, columns, rows_aligned};
  }
  // Means of the far field of a query.
  template <typename Element>
  LONGVQ_DEVICE Rows<Element> means(int64_t query, int64_t first, int columns) const {
    const int64_t pitch = value_pitch(p.values), row = far_field(query) * padded_codes(p.codebook.codes);
    return {static_cast<const Element*>(p.means) + row * pitch + first, pitch, columns, true};
  }
  template <int PARTS, int DEPTH>
  LONGVQ_DEVICE const uint16_t* codewords() const {
    return p.codebook.parts + kv_head * PARTS * padded_codes(p.codebook.codes) * DEPTH;
  }
};

// Gradients of the outputs of a head, columns from `first` on.
template <typename Element>
LONGVQ_DEVICE Rows<Element> grads_of(
    const AttentionGradients& g, const Head& head, int64_t first, int columns, bool rows_aligned) {
  const auto* grad = static_cast<const Element*>(g.grad) + head.batch * g.grad_batch + head.head * g.grad_head;
  return {grad + head.start * g.grad_length + first, g.grad_length, columns, rows_aligned};
}

// Mega's attention function, ½ (1 + erf((x − μ) / (σ √2))) with μ = √½, σ = √(1 / 4π), and its derivative.
LONGVQ_DEVICE float laplace(float x) {
  return 0.5f * erfcf((0.70710678f - x) * 2.50662827f);
}
LONGVQ_DEVICE float laplace_slope(float x) {
  const float y = (x - 0.70710678f) * 2.50662827f;
  return 1.41421356f * expf(-y * y);
}

// The block of queries of a block of threads. Shared memory: its queries, MORE bytes for what derives from this, and
// BUFFERS times keys and values of a tile.
template <typename Element, int DEPTH, int VALUES, int MTILES, int BUFFERS, size_t MORE>
struct QueryBlock {
  using Operand = typename OperandOf<Element>::type;
  static constexpr int kMTiles = MTILES, kRows = 16 * MTILES * kWarps, kBuffers = BUFFERS;
  static constexpr int kTile = kTileOf<Operand>, kFragments = kTile / 8;
  using Queries = Tile<kRows, DEPTH, Operand::kParts>;
  using Keys = Tile<kTile, DEPTH, Operand::kParts>;
  using Values = Tile<kTile, VALUES, Operand::kParts>;
  static constexpr size_t kBytes = Queries::kBytes + MORE + BUFFERS * (Keys::kBytes + Values::kBytes);

  const Attention& p;
  Alignment aligned;
  Head head;
  int first_value, first, last, warp, lane;

  LONGVQ_DEVICE QueryBlock(const Attention& problem, Alignment alignment)
      : p(problem), aligned(alignment), head(problem) {
    // Slices of values; a block has one, or goes through them.
    const int heads = static_cast<int>(p.heads), slices = static_cast<int>(gridDim.y) / heads;
    const Piece piece = piece_of(p, kRows, blockIdx.x, blockIdx.z);
    head.enter(piece.of);
    head.head = static_cast<int>(blockIdx.y) / slices;
    head.kv_head = head.head / (heads / static_cast<int>(p.kv_heads));
    first_value = static_cast<int>(blockIdx.y) % slices * VALUES;
    first = static_cast<int>(piece.index) * kRows;
    last = min(first + kRows, head.length);
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
  }

  LONGVQ_DEVICE bool has_queries() const { return first < last; }

  LONGVQ_DEVICE Queries queries() const { return {reinterpret_cast<uint16_t*>(shared_memory())}; }
  LONGVQ_DEVICE char* more() const { return shared_memory() + Queries::kBytes; }
  LONGVQ_DEVICE char* buffer(int number) const {
    return more() + MORE + number % BUFFERS * (Keys::kBytes + Values::kBytes);
  }
  LONGVQ_DEVICE Keys keys(int number) const { return {reinterpret_cast<uint16_t*>(buffer(number))}; }
  LONGVQ_DEVICE Values values(int number) const { return {reinterpret_cast<uint16_t*>(buffer(number) + Keys::kBytes)}; }
  LONGVQ_DEVICE int columns_of_values(int64_t slice) const {
    return static_cast<int>(min(p.values - slice, int64_t{VALUES}));
  }
  LONGVQ_DEVICE int row(int m, int half) const { return (warp * MTILES + m) * 16 + lane / 4 + half * 8; }

  // How many keys the columns of a tile stand for. Asked for before the products, which don't wait for it. Codes
  // that don't exist have a place there, in which anything may be.
  LONGVQ_DEVICE void load_numbers(float (&numbers)[kFragments][2], const Columns& columns) const {
    const float* from = head.numbers(first) + columns.first + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
      TwoFloats pair{1, 1};
      if (columns.kind == Columns::kCodes) {
        pair = *reinterpret_cast<const TwoFloats*>(from + n * 8);
      }
      numbers[n][0] = pair.first, numbers[n][1] = pair.second;
    }
  }

  LONGVQ_DEVICE void fill_queries(bool far) const {
    fill<Operand, kThreads>(queries(), head.queries<Element>(far, aligned.q), [&](int row) {
      return first + row < last ? first + row : -1;
    });
  }

  LONGVQ_DEVICE void fill_columns(const Columns& columns, int number) const {
    const auto row_of = [&](int row) { return columns.first + row < columns.last ? columns.first + row : -1; };
    if (columns.kind == Columns::kInside) {
      fill<Operand, kThreads>(keys(number), head.keys<Element>(aligned.k), row_of);
    } else {
      const uint16_t* parts = head.codewords<Operand::kParts, DEPTH>();
      fill_packed<kThreads>(keys(number), parts, padded_codes(p.codebook.codes), [&](int row) {
        const int column = row_of(row);
        return column < 0 || columns.kind == Columns::kCodes ? column : head.code_of(column);
      });
    }
    fill_values(columns, number, first_value);
  }

  // Values of a tile, or means, from column `slice` on.
  LONGVQ_DEVICE void fill_values(const Columns& columns, int number, int64_t slice) const {
    const int count = columns_of_values(slice);
    const auto rows = columns.kind == Columns::kCodes ? head.means<Element>(first, slice, count)
                                                      : head.values<Element>(slice, count, aligned.v);
    fill<Operand, kThreads>(
        values(number), rows, [&](int row) { return columns.first + row < columns.last ? columns.first + row : -1; });
  }

  // Calls visit(columns, number) for every tile when it is in shared memory, and turn() once between the far queries
  // and the near ones, where those are others; before all tiles where none needs far ones.
  template <typename Visit, typename Turn>
  LONGVQ_DEVICE void past_all_columns(const Visit& visit, const Turn& turn) {
    const ColumnTiles tiles(p, first, last, head.length);
    const int count = tiles.count(kTile);
    bool far = true;
    // Two kinds of queries must never be on their way to one place.
    fill_queries(p.far_first == 0 || tiles.at(0, kTile).kind != Columns::kInside);
    fill_columns(tiles.at(0, kTile), 0);
    commit_copies();
    for (int number = 0; number < count; ++number) {
      const Columns columns = tiles.at(number, kTile);
      forget(head.batch), forget(head.start), forget(head.kv_head),
          forget(lane);  // addresses are made again for each tile
      if (BUFFERS == 2 && number + 1 < count) {
        fill_columns(tiles.at(number + 1, kTile), number + 1);
      }
      commit_copies();  // an empty group too: the newest one is always that of the next tile
      if (far && columns.kind == Columns::kInside && p.far_first > 0) {
        far = false;  // all threads are past the products with the queries before
        turn();
        if (number > 0) {
          fill_queries(far);
          commit_copies();
        }
        wait_for_copies<0>();
      } else {
        wait_for_copies<BUFFERS - 1>();
      }
      __syncthreads();
      visit(columns, number);
      __syncthreads();
      if (BUFFERS == 1 && number + 1 < count) {
        fill_columns(tiles.at(number + 1, kTile), number + 1);
        commit_copies();
      }
    }
  }
};

}  // namespace
}  // namespace longvq::cuda
