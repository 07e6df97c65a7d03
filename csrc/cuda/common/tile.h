// Tiles of 16-bit numbers in shared memory, which are the operands of tensor cores, and their products.
//
// A fragment is a lane's share of a matrix in registers, as mma.m16n8k16 defines it. A result of (16, 8) numbers is a
// float[4]: rows g and g + 8, columns 2t and 2t + 1, with g = lane / 4 and t = lane % 4.
#pragma once

#include "dtypes.h"

namespace longvq::cuda {

// A matrix (ROWS, COLUMNS) for each of TERMS terms; COLUMNS is a multiple of 16. Rows are an odd number of 16-byte
// units apart, so that the eight rows of a matrix load lie in different banks.
template <int ROWS, int COLUMNS, int TERMS>
struct Tile {
  static constexpr int kRows = ROWS, kColumns = COLUMNS, kTerms = TERMS;
  static constexpr int kPitch = COLUMNS + 8;
  static constexpr size_t kBytes = sizeof(uint16_t) * TERMS * ROWS * kPitch;

  uint16_t* data;

  LONGVQ_DEVICE uint16_t* at(int term, int row, int column) const {
    return data + (term * ROWS + row) * kPitch + column;
  }
};

// Loads the left operand of a product: rows row .. row + 16, columns column .. column + 16 of the tile.
template <typename T>
LONGVQ_DEVICE void load_left(uint32_t (&out)[4], const T& tile, int term, int row, int column) {
  const int lane = threadIdx.x % 32;
  load_matrices(out, tile.at(term, row + lane % 16, column + lane / 16 * 8));
}

// Loads two right operands from a tile that holds their transposes: rows row .. row + 16, columns column .. column + 16
// of the tile. The first 8 rows become out[0] and out[1], the others out[2] and out[3].
template <typename T>
LONGVQ_DEVICE void load_right_transposed(uint32_t (&out)[4], const T& tile, int term, int row, int column) {
  const int lane = threadIdx.x % 32;
  load_matrices(out, tile.at(term, row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
}

// Loads two right operands side by side: rows row .. row + 16, columns column .. column + 16 of the tile.
template <typename T>
LONGVQ_DEVICE void load_right(uint32_t (&out)[4], const T& tile, int term, int row, int column) {
  const int lane = threadIdx.x % 32;
  load_matrices_transposed(out, tile.at(term, row + lane % 16, column + lane / 16 * 8));
}

// Adds the products of the first TERMS terms of `left` with one term of `right`, the smallest first. `out` is two
// fragments side by side for each of MTILES times 16 rows.
template <typename Operand, int TERMS, int COUNT, int MTILES>
LONGVQ_DEVICE void multiply_terms(
    float (&out)[MTILES][2][4], const uint32_t (&left)[COUNT][MTILES][4], const uint32_t (&right)[4]) {
#pragma unroll
  for (int i = (TERMS < COUNT ? TERMS : COUNT) - 1; i >= 0; --i) {
#pragma unroll
    for (int m = 0; m < MTILES; ++m) {
      Operand::multiply_add(out[m][0], left[i][m], right[0], right[1]);
      Operand::multiply_add(out[m][1], left[i][m], right[2], right[3]);
    }
  }
}

template <int MTILES, int NTILES>
LONGVQ_DEVICE void add_fragments(float (&out)[MTILES][NTILES][4], int n, const float (&sum)[MTILES][2][4]) {
#pragma unroll
  for (int m = 0; m < MTILES; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[m][n][i] += sum[m][0][i];
      out[m][n + 1][i] += sum[m][1][i];
    }
  }
}

// out += left · right for fragments n and n + 1; load(b, j) loads term j of their right operands.
//
// Tensor cores truncate everything below the last bit of the largest summand. So the products of several terms are
// first summed by themselves, the smallest first, and then added to `out` in ordinary float32.
template <typename Operand, int RIGHT, int LEFT, int MTILES, int NTILES, typename Load>
LONGVQ_DEVICE void multiply_pair(
    float (&out)[MTILES][NTILES][4], int n, const uint32_t (&left)[LEFT][MTILES][4], const Load& load) {
  uint32_t b[4];
  if constexpr (LEFT == 1 && RIGHT == 1) {
    load(b, 0);
#pragma unroll
    for (int m = 0; m < MTILES; ++m) {
      Operand::multiply_add(out[m][n], left[0][m], b[0], b[1]);
      Operand::multiply_add(out[m][n + 1], left[0][m], b[2], b[3]);
    }
  } else {
    float sum[MTILES][2][4] = {};
    // Only six of the nine products of terms reach the last bit. The three calls are written out, because the number of
    // terms must be a constant.
    static_assert(RIGHT == 3, "one or three terms");
    load(b, 2);
    multiply_terms<Operand, 1>(sum, left, b);
    load(b, 1);
    multiply_terms<Operand, 2>(sum, left, b);
    load(b, 0);
    multiply_terms<Operand, 3>(sum, left, b);
    add_fragments(out, n, sum);
  }
}

// out += left · rightᵀ, for 16 · MTILES rows of `left` from `row` and all rows of `right`.
template <typename Operand, int MTILES, typename Left, typename Right>
LONGVQ_DEVICE void multiply_rows(
    float (&out)[MTILES][Right::kRows / 8][4], const Left& left, int row, const Right& right) {
  static_assert(Left::kColumns == Right::kColumns, "both have head_dim columns");
#pragma unroll(Left::kTerms == 1 ? 2 : 1)  // if unrolled fully, compilers move loads forward until registers spill
  for (int k = 0; k < Left::kColumns; k += 16) {
    uint32_t a[Left::kTerms][MTILES][4];
#pragma unroll
    for (int i = 0; i < Left::kTerms; ++i) {
#pragma unroll
      for (int m = 0; m < MTILES; ++m) {
        load_left(a[i][m], left, i, row + 16 * m, k);
      }
    }
#pragma unroll
    for (int n = 0; n < Right::kRows; n += 16) {
      multiply_pair<Operand, Right::kTerms>(
          out, n / 8, a, [&](uint32_t (&b)[4], int term) { load_right_transposed(b, right, term, n, k); });
    }
  }
}

// out += left · right, for rows row .. row + 16 of `right` and its columns from `column`; `left` holds (16, 16)
// operands.
template <typename Operand, int MTILES, int NTILES, typename Right>
LONGVQ_DEVICE void multiply_fragments(
    float (&out)[MTILES][NTILES][4], const uint32_t (&left)[Operand::kTerms][MTILES][4], const Right& right, int row,
    int column) {
  static_assert(Right::kTerms == Operand::kTerms, "both have the same terms");
#pragma unroll
  for (int n = 0; n < NTILES; n += 2) {
    multiply_pair<Operand, Right::kTerms>(
        out, n, left, [&](uint32_t (&b)[4], int term) { load_right(b, right, term, row, column + n * 8); });
  }
}

// Turns two result fragments (16, 8) that lie side by side into a left operand (16, 16).
template <typename Operand, int MTILES>
LONGVQ_DEVICE void set_left(
    uint32_t (&out)[Operand::kTerms][MTILES][4], int m, const float (&first)[4], const float (&second)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Rows g and g + 8 of the first 8 columns, then of the last 8.
    const float* pair = (i < 2 ? first : second) + i % 2 * 2;
    uint32_t terms[Operand::kTerms];
    Operand::split_pair(pair[0], pair[1], terms);
#pragma unroll
    for (int p = 0; p < Operand::kTerms; ++p) {
      out[p][m][i] = terms[p];
    }
  }
}

// out += weights · right, where `weights` are the result fragments of another product.
template <typename Operand, int MTILES, typename Right>
LONGVQ_DEVICE void multiply_weights(
    float (&out)[MTILES][Right::kColumns / 8][4], const float (&weights)[MTILES][Right::kRows / 8][4],
    const Right& right) {
#pragma unroll
  for (int k = 0; k < Right::kRows; k += 16) {
    uint32_t left[Operand::kTerms][MTILES][4];
#pragma unroll
    for (int m = 0; m < MTILES; ++m) {
      set_left<Operand>(left, m, weights[m][k / 8], weights[m][k / 8 + 1]);
    }
    multiply_fragments<Operand>(out, left, right, k, 0);
  }
}

// A matrix in global memory. Columns after `columns` are read as zero.
template <typename Element>
struct Rows {
  const Element* data;
  int64_t stride;
  int columns;
  bool aligned;  // whether all rows begin at multiples of 16 bytes
};

// Fills a tile; all threads of the block call this. Row r of the tile is row row_of(r) of `rows`, or zero if row_of(r)
// is negative. Copies may be asynchronous: the tile is complete after commit_copies, wait_for_copies and __syncthreads.
template <typename Operand, int THREADS, typename Element, typename T, typename RowOf>
LONGVQ_DEVICE void fill(const T& tile, const Rows<Element>& rows, const RowOf& row_of) {
  constexpr int kUnits = T::kColumns / 8;
#pragma unroll 1  // unrolled, the addresses of all rounds are kept in registers
  for (int i = threadIdx.x; i < T::kRows * kUnits; i += THREADS) {
    const int row = i / kUnits, column = i % kUnits * 8;
    const int64_t from = row_of(row);
    const int valid = from < 0 ? 0 : min(max(rows.columns - column, 0), 8);
    const Element* source = rows.data + (valid > 0 ? from * rows.stride + column : 0);
    if constexpr (sizeof(Element) == 2 && T::kTerms == 1) {
      if (rows.aligned) {
        copy_async(tile.at(0, row, column), source, valid * static_cast<int>(sizeof(Element)));
        continue;
      }
    }
#pragma unroll
    for (int c = 0; c < 8; c += 2) {
      uint32_t terms[T::kTerms];
      Operand::split_pair(
          c < valid ? to_float(source[c]) : 0.0f, c + 1 < valid ? to_float(source[c + 1]) : 0.0f, terms);
#pragma unroll
      for (int p = 0; p < T::kTerms; ++p) {
        *reinterpret_cast<uint32_t*>(tile.at(p, row, column + c)) = terms[p];
      }
    }
  }
}

// The same from the packed codebook of one head, (terms, codes, columns).
template <int THREADS, typename T, typename RowOf>
LONGVQ_DEVICE void fill_packed(const T& tile, const uint16_t* terms, int64_t codes, const RowOf& row_of) {
  constexpr int kUnits = T::kColumns / 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < T::kTerms * T::kRows * kUnits; i += THREADS) {
    const int term = i / (T::kRows * kUnits), row = i / kUnits % T::kRows, column = i % kUnits * 8;
    const int64_t from = row_of(row);
    const int64_t offset = (term * codes + max(from, int64_t{0})) * T::kColumns + column;
    copy_async(tile.at(term, row, column), terms + offset, from < 0 ? 0 : 16);
  }
}

}  // namespace longvq::cuda
