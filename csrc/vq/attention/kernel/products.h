// Matrix products: each number of the left matrix is multiplied by a row of a panel of the right matrix.
#pragma once

#include "../../../common/simd.h"

namespace longvq {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 6, kVectors = 4;  // 24 accumulators + 4 + 1 of 32 registers
#elif defined(__AVX2__)
constexpr int kRows = 6, kVectors = 2;  // 12 + 2 + 1 of 16
#else
constexpr int kRows = 4, kVectors = 2;  // 8 + 2 + 1 and a product of 16
#endif
constexpr int kPanel = kVectors * kLanes;

// The left matrix (rows, depth) of a product; TRANSPOSED: stored as (depth, rows).
template <bool TRANSPOSED>
struct Left {
  const float* data;
  int64_t stride;

  float at(int64_t row, int64_t k) const { return TRANSPOSED ? data[k * stride + row] : data[row * stride + k]; }
  Left from_row(int64_t row) const { return {data + (TRANSPOSED ? row : row * stride), stride}; }
};

// The right matrix of a product: rows first .. first + depth of a matrix in panels that has `panel_depth` rows.
struct Right {
  const float* data;
  int64_t panel_depth, first, depth;

  const float* panel(int64_t column, int width) const { return data + column * panel_depth + first * width; }
};

struct Out {
  float* data;
  int64_t stride;
};

template <int ROWS, int VECTORS, bool ADD, bool TRANSPOSED>
inline void tile(const Left<TRANSPOSED>& a, const float* panel, int64_t depth, const Out& out) {
  Floats acc[ROWS][VECTORS] = {};
  for (int r = 0; ADD && r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) {
      acc[r][v] = load<Floats>(out.data + r * out.stride + v * kLanes);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Floats b[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      b[v] = load<Floats>(panel + (k * VECTORS + v) * kLanes);
    }
    for (int r = 0; r < ROWS; ++r) {
      const float value = a.at(r, k);
      for (int v = 0; v < VECTORS; ++v) {
        acc[r][v] += b[v] * value;
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) {
      store(out.data + r * out.stride + v * kLanes, acc[r][v]);
    }
  }
}

template <int VECTORS, bool ADD, bool TRANSPOSED>
inline void panel_product(int64_t rows, const Left<TRANSPOSED>& a, const Right& b, int64_t column, const Out& out) {
  const float* panel = b.panel(column, VECTORS * kLanes);
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    tile<kRows, VECTORS, ADD>(a.from_row(r), panel, b.depth, {out.data + r * out.stride + column, out.stride});
  }
  for (; r < rows; ++r) {
    tile<1, VECTORS, ADD>(a.from_row(r), panel, b.depth, {out.data + r * out.stride + column, out.stride});
  }
}

// out (rows, columns) = a b, with ADD out += a b.
template <bool ADD, bool TRANSPOSED>
inline void product(int64_t rows, const Left<TRANSPOSED>& a, const Right& b, int64_t columns, const Out& out) {
  int64_t c = 0;
  for (; c + kPanel <= columns; c += kPanel) {
    panel_product<kVectors, ADD>(rows, a, b, c, out);
  }
  switch ((columns - c) / kLanes) {
#if defined(__AVX512F__)
    case 3:
      return panel_product<3, ADD>(rows, a, b, c, out);
    case 2:
      return panel_product<2, ADD>(rows, a, b, c, out);
#endif
    case 1:
      return panel_product<1, ADD>(rows, a, b, c, out);
    default:
      return;
  }
}

}  // namespace
}  // namespace longvq
