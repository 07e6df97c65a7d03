// Matrices with strides, and matrices in panels as the kernels read them (attention/kernel/attention_kernel.h).
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/aligned_array.h"
#include "../common/convert.h"
#include "../common/numbers.h"

namespace longvq {

// A (rows, columns) matrix with strides.
struct Matrix {
  const char* data;
  int64_t row_stride, column_stride, columns;
  ElementType type;

  // Row `i` as contiguous floats: a pointer into the matrix if its rows are contiguous floats, otherwise into `buffer`.
  const float* row(int64_t i, float* buffer) const {
    const char* first = data + i * row_stride * element_size(type);
    if (type == ElementType::kFloat && column_stride == 1) {
      return reinterpret_cast<const float*>(first);
    }
    load_row(first, type, column_stride, columns, buffer);
    return buffer;
  }
};

// A matrix (depth, columns) in panels.
struct Panels {
  int64_t depth, columns, panel;
  AlignedArray<float> data;

  Panels(int64_t depth, int64_t columns, int64_t panel)
      : depth(depth), columns(columns), panel(panel), data(aligned_array<float>(depth * columns)) {}

  // Changes the sizes without a new allocation. The product of the new sizes must not exceed that of the constructor's.
  void resize(int64_t new_depth, int64_t new_columns) {
    depth = new_depth;
    columns = new_columns;
  }

  void clear() { std::fill_n(data.get(), depth * columns, 0.0f); }

  int64_t width(int64_t first_column) const { return std::min(panel, columns - first_column); }

  // Copies `depth` numbers to a column.
  void set_column(int64_t column, const float* values) {
    const int64_t first = column / panel * panel, step = width(first);
    float* out = data.get() + first * depth + column - first;
    for (int64_t d = 0; d < depth; ++d) {
      out[d * step] = values[d];
    }
  }

  // set_row copies `count` numbers to a row, add_to_row adds them.
  void set_row(int64_t row, const float* values, int64_t count) {
    pieces(row, count, [&](float* out, int64_t first, int64_t n) { std::copy_n(values + first, n, out); });
  }

  void add_to_row(int64_t row, const float* values, int64_t count) {
    pieces(row, count, [&](float* out, int64_t first, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        out[i] += values[first + i];
      }
    });
  }

 private:
  // Calls use(pointer, first column, number of columns) for each panel's piece of a row.
  template <typename Use>
  void pieces(int64_t row, int64_t count, const Use& use) {
    for (int64_t first = 0; first < count; first += panel) {
      use(data.get() + first * depth + row * width(first), first, std::min(panel, count - first));
    }
  }
};

}  // namespace longvq
