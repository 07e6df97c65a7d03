// Matrices of one head with strides, and in the panels that the kernel reads (attention_kernel.h).
#pragma once

#include <algorithm>
#include <cstdint>

#include "../aligned.h"

namespace longvq {

// A (rows, columns) matrix with strides.
struct Matrix {
  const float* data;
  int64_t row_stride, column_stride;

  const float* row(int64_t i) const { return data + i * row_stride; }
};

// A (depth, columns) matrix in panels, see attention_kernel.h.
struct Panels {
  int64_t depth, columns, panel;
  AlignedArray<float> data;

  Panels(int64_t depth, int64_t columns, int64_t panel)
      : depth(depth), columns(columns), panel(panel), data(aligned_array<float>(depth * columns)) {}

  int64_t width(int64_t first_column) const { return std::min(panel, columns - first_column); }

  void clear() { std::fill_n(data.get(), depth * columns, 0.0f); }

  // Writes column `column`: `depth` numbers, `stride` apart.
  void set_column(int64_t column, const float* values, int64_t stride) {
    const int64_t first = column / panel * panel, width_ = width(first);
    float* out = data.get() + first * depth + column - first;
    for (int64_t d = 0; d < depth; ++d) {
      out[d * width_] = values[d * stride];
    }
  }

  // Calls use(columns, first column, count) for the pieces of row `row`.
  template <typename Use>
  void pieces(int64_t row, int64_t count, const Use& use) {
    for (int64_t first = 0; first < count; first += panel) {
      use(data.get() + first * depth + row * width(first), first, std::min(panel, count - first));
    }
  }

  // Row `row` becomes, or grows by, `values`.
  void set_row(int64_t row, const float* values, int64_t stride, int64_t count) {
    pieces(row, count, [&](float* out, int64_t first, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        out[i] = values[(first + i) * stride];
      }
    });
  }

  void add_to_row(int64_t row, const float* values, int64_t stride, int64_t count) {
    pieces(row, count, [&](float* out, int64_t first, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        out[i] += values[(first + i) * stride];
      }
    });
  }
};

}  // namespace longvq
