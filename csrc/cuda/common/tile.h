// Tiles of 16-bit numbers in shared memory, the operands of tensor cores, and products of them.
#pragma once

#include "dtypes.h"

namespace longvq::cuda {

// Rows of COLUMNS numbers, a multiple of 16, in PARTS copies, one for each part of the numbers. Rows are an odd number
// of 16-byte units apart, so that the eight rows of a matrix load lie in different banks.
template <int ROWS, int COLUMNS, int PARTS>
struct Tile {
  static constexpr int kRows = ROWS, kColumns = COLUMNS, kParts = PARTS;
  static constexpr int kPitch = COLUMNS + 8;
  static constexpr size_t kBytes = sizeof(uint16_t) * PARTS * ROWS * kPitch;

  uint16_t* data;

  LONGVQ_DEVICE uint16_t* at(int part, int row, int column) const {
    return data + (part * ROWS + row) * kPitch + column;
  }
};

// The first operand of a product: rows `row` .. + 16, columns `column` .. + 16.
template <typename T>
LONGVQ_DEVICE void load_left(uint32_t (&out)[4], const T& tile, int part, int row, int column) {
  const int lane = threadIdx.x % 32;
  load_matrices(out, tile.at(part, row + lane % 16, column + lane / 16 * 8));
}

// The second operand, of which the tile has the columns as rows: two times 8 rows, 16 columns.
// out[0], out[1]: the first 8 rows; out[2], out[3]: the others.
template <typename T>
LONGVQ_DEVICE void load_right_rows(uint32_t (&out)[4], const T& tile, int part, int row, int column) {
  const int lane = threadIdx.x % 32;
  load_matrices(out, tile.at(part, row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
}

// The second operand as the tile has it: 16 rows, two times 8 columns.
template <typename T>
LONGVQ_DEVICE void load_right(uint32_t (&out)[4], const T& tile, int part, int row, int column) {
  const int lane = threadIdx.x % 32;
  load_matrices_transposed(out, tile.at(part, row + lane % 16, column + lane / 16 * 8));
}

// Two fragments side by side, (16, 16) for each 16 rows: += the products of the first PARTS of `left` and one part of
// `right`, the smallest first.
template <typename Operand, int PARTS, int COUNT, int MTILES>
LONGVQ_DEVICE void multiply_parts(
    float (&out)[MTILES][2][4], const uint32_t (&left)[COUNT][MTILES][4], const uint32_t (&right)[4]) {
#pragma unroll
  for (int i = (PARTS < COUNT ? PARTS : COUNT) - 1; i >= 0; --i) {
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

// out += left · right, two fragments side by side from n; load(b, j) reads part j of them. Tensor cores cut off what is
// below the last bit of the largest term, so that products of small parts have sums of their own, into which larger
// ones come later, and what has been summed so far is added as other numbers are.
template <typename Operand, int RIGHT, int LEFT, int MTILES, int NTILES, typename Load>
LONGVQ_DEVICE void multiply_pair(
    float (&out)[MTILES][NTILES][4], int n, const uint32_t (&left)[LEFT][MTILES][4], const Load& load) {
  constexpr int kLast = LEFT > RIGHT ? LEFT : RIGHT;  // of the pairs of parts those that are not below the last bit
  uint32_t b[4];
  if constexpr (kLast == 1) {
    load(b, 0);
#pragma unroll
    for (int m = 0; m < MTILES; ++m) {
      Operand::multiply_add(out[m][n], left[0][m], b[0], b[1]);
      Operand::multiply_add(out[m][n + 1], left[0][m], b[2], b[3]);
    }
  } else {
    float sum[MTILES][2][4] = {};
    static_assert(RIGHT == 3, "written out, since the number of parts left of each is a constant");
    load(b, 2);
    multiply_parts<Operand, 1>(sum, left, b);
    load(b, 1);
    multiply_parts<Operand, 2>(sum, left, b);
    load(b, 0);
    multiply_parts<Operand, 3>(sum, left, b);
    add_fragments(out, n, sum);
  }
}

// out += left · rightᵀ for the 16 · MTILES rows of a warp from `row` and all rows of `right`, as fragments (16, 8).
template <typename Operand, int MTILES, typename Left, typename Right>
LONGVQ_DEVICE void multiply_rows(
    float (&out)[MTILES][Right::kRows / 8][4], const Left& left, int row, const Right& right) {
  static_assert(Left::kColumns == Right::kColumns, "both have the depth as columns");
#pragma unroll(Left::kParts == 1 ? 2 : 1)  // all of it, and loads are moved up until registers spill
  for (int k = 0; k < Left::kColumns; k += 16) {
    uint32_t a[Left::kParts][MTILES][4];
#pragma unroll
    for (int i = 0; i < Left::kParts; ++i) {
#pragma unroll
      for (int m = 0; m < MTILES; ++m) {
        load_left(a[i][m], left, i, row + 16 * m, k);
      }
    }
#pragma unroll
    for (int n = 0; n < Right::kRows; n += 16) {
      multiply_pair<Operand, Right::kParts>(
          out, n / 8, a, [&](uint32_t (&b)[4], int part) { load_right_rows(b, right, part, n, k); });
    }
  }
}

// out += left · right for 16 rows of `right` from `row`, its columns from `column`; `left` as fragments (16, 16).
template <typename Operand, int MTILES, int NTILES, typename Right>
LONGVQ_DEVICE void multiply_fragments(
    float (&out)[MTILES][NTILES][4], const uint32_t (&left)[Operand::kParts][MTILES][4], const Right& right, int row,
    int column) {
  static_assert(Right::kParts == Operand::kParts, "both in the same parts");
#pragma unroll
  for (int n = 0; n < NTILES; n += 2) {
    multiply_pair<Operand, Right::kParts>(
        out, n, left, [&](uint32_t (&b)[4], int part) { load_right(b, right, part, row, column + n * 8); });
  }
}

// Two fragments (16, 8) of a result, side by side, become a left operand.
template <typename Operand, int MTILES>
LONGVQ_DEVICE void set_left(
    uint32_t (&out)[Operand::kParts][MTILES][4], int m, const float (&first)[4], const float (&second)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Rows g and g + 8 of the left 8 columns, then of the right ones.
    const float* pair = (i < 2 ? first : second) + i % 2 * 2;
    uint32_t parts[Operand::kParts];
    Operand::split_pair(pair[0], pair[1], parts);
#pragma unroll
    for (int p = 0; p < Operand::kParts; ++p) {
      out[p][m][i] = parts[p];
    }
  }
}

// out += weights · right, where `weights` are fragments (16, 8) as a product leaves them.
template <typename Operand, int MTILES, typename Right>
LONGVQ_DEVICE void multiply_weights(
    float (&out)[MTILES][Right::kColumns / 8][4], const float (&weights)[MTILES][Right::kRows / 8][4],
    const Right& right) {
#pragma unroll
  for (int k = 0; k < Right::kRows; k += 16) {
    uint32_t left[Operand::kParts][MTILES][4];
#pragma unroll
    for (int m = 0; m < MTILES; ++m) {
      set_left<Operand>(left, m, weights[m][k / 8], weights[m][k / 8 + 1]);
    }
    multiply_fragments<Operand>(out, left, right, k, 0);
  }
}

// Rows of a matrix in global memory; `columns` of each exist, more are zero.
template <typename Element>
struct Rows {
  const Element* data;
  int64_t stride;
  int columns;
  bool aligned;  // all rows begin at multiples of 16 bytes
};

// Fills a tile by all threads of the block: its row r is row row_of(r) of `rows`, or zero if that is negative.
// Asynchronous where that is possible; visible after wait_for_copies and __syncthreads.
template <typename Operand, int THREADS, typename Element, typename T, typename RowOf>
LONGVQ_DEVICE void fill(const T& tile, const Rows<Element>& rows, const RowOf& row_of) {
  constexpr int kUnits = T::kColumns / 8;
#pragma unroll 1  // otherwise the addresses of all rounds are kept in registers
  for (int i = threadIdx.x; i < T::kRows * kUnits; i += THREADS) {
    const int row = i / kUnits, column = i % kUnits * 8;
    const int64_t from = row_of(row);
    const int there = from < 0 ? 0 : min(max(rows.columns - column, 0), 8);
    const Element* source = rows.data + (there > 0 ? from * rows.stride + column : 0);
    if constexpr (sizeof(Element) == 2 && T::kParts == 1) {
      if (rows.aligned) {
        copy_later(tile.at(0, row, column), source, there * static_cast<int>(sizeof(Element)));
        continue;
      }
    }
#pragma unroll
    for (int c = 0; c < 8; c += 2) {
      uint32_t parts[T::kParts];
      Operand::split_pair(
          c < there ? to_float(source[c]) : 0.0f, c + 1 < there ? to_float(source[c + 1]) : 0.0f, parts);
#pragma unroll
      for (int p = 0; p < T::kParts; ++p) {
        *reinterpret_cast<uint32_t*>(tile.at(p, row, column + c)) = parts[p];
      }
    }
  }
}

// The same from a packed codebook of one head, (parts, codes, columns), whose row is zero where row_of(r) is negative.
template <int THREADS, typename T, typename RowOf>
LONGVQ_DEVICE void fill_packed(const T& tile, const uint16_t* parts, int64_t codes, const RowOf& row_of) {
  constexpr int kUnits = T::kColumns / 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < T::kParts * T::kRows * kUnits; i += THREADS) {
    const int part = i / (T::kRows * kUnits), row = i / kUnits % T::kRows, column = i % kUnits * 8;
    const int64_t from = row_of(row);
    const int64_t offset = (part * codes + max(from, int64_t{0})) * T::kColumns + column;
    copy_later(tile.at(part, row, column), parts + offset, from < 0 ? 0 : 16);
  }
}

}  // namespace longvq::cuda
