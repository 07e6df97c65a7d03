// What a block of queries sees of the keys: their codes' sums from afar, and the near ones one by one.
#pragma once

#include <algorithm>
#include <vector>

#include "attention_problem.h"

namespace longvq {

// The layout of the sums: by codes as rows for weights times sums, as columns for gradients times sums.
enum class Sums { kRows, kColumns };

// Numbers of the far keys of each code and sums of their values.
struct FarField {
  Sums layout;
  Panels sums;
  AlignedArray<float> counts, offsets;
  std::vector<float> buffer;
  int64_t keys = 0;

  FarField(const Problem& p, Sums layout)
      : layout(layout), sums(
            layout == Sums::kRows ? p.far_columns : p.values, layout == Sums::kRows ? p.value_columns : p.far_columns,
            p.kernel.panel),
        counts(aligned_array<float>(p.far_columns)), offsets(aligned_array<float>(p.far_columns)), buffer(p.values) {
    clear(p);
  }

  void clear(const Problem& p) {
    sums.clear();
    std::fill_n(counts.get(), p.far_columns, 0.0f);
    // Under softmax a code without a far key must not set the largest score.
    std::fill_n(offsets.get(), p.far_columns, p.weight == AttentionWeight::kSoftmax ? -kInfinity : 0.0f);
    keys = 0;
  }

  void copy(const Problem& p, const FarField& other) {
    std::copy_n(other.sums.data.get(), sums.depth * sums.columns, sums.data.get());
    std::copy_n(other.counts.get(), p.far_columns, counts.get());
    std::copy_n(other.offsets.get(), p.far_columns, offsets.get());
    keys = other.keys;
  }

  void add(const Problem& p, const Keys& of, int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j) {
      if (of.ignored(j)) {
        continue;
      }
      const int64_t code = of.code(j);
      const float* value = of.v.row(j, buffer.data());
      if (layout == Sums::kRows) {
        sums.add_to_row(code, value, p.values);
      } else {
        sums.add_to_column(code, value);
      }
      counts[code] += 1.0f;
      offsets[code] = 0.0f;
      ++keys;
    }
  }
};

// The codebook of a head, (D, far_columns) or, as rows, (far_columns, depth_columns).
inline Panels pack_codebook(const Problem& p, const Keys& keys, bool as_rows) {
  Panels panels(
      as_rows ? p.far_columns : p.depth, as_rows ? p.depth_columns : p.far_columns, p.kernel.panel);
  panels.clear();
  std::vector<float> buffer(p.depth);
  for (int64_t code = 0; code < p.num_codes; ++code) {
    const float* codeword = keys.codebook.row(code, buffer.data());
    if (as_rows) {
      panels.set_row(code, codeword, p.depth);
    } else {
      panels.set_column(code, codeword);
    }
  }
  return panels;
}

// The near keys of a block as the kernels read them. Those of the backward have both layouts.
struct NearKeys {
  int64_t columns = 0;  // padded
  Panels codewords, exact_keys, values;
  Panels codeword_rows, exact_rows;
  AlignedArray<float> offsets;
  bool backward;
  std::vector<float> buffer;

  NearKeys(const Problem& p, int64_t most, bool backward)
      : codewords(p.depth, most, p.kernel.panel), exact_keys(p.exact ? p.depth : 0, most, p.kernel.panel),
        values(backward ? p.values : most, backward ? most : p.value_columns, p.kernel.panel),
        codeword_rows(backward ? most : 0, p.depth_columns, p.kernel.panel),
        exact_rows(backward && p.exact ? most : 0, p.depth_columns, p.kernel.panel),
        offsets(aligned_array<float>(most)), backward(backward), buffer(std::max(p.depth, p.values)) {}

  void gather(const Problem& p, const Keys& keys, int64_t first, int64_t last) {
    const int64_t count = last - first;
    columns = round_up(count, p.kernel.lanes);
    codewords.resize(p.depth, columns);
    exact_keys.resize(exact_keys.depth, columns);
    values.resize(backward ? p.values : columns, backward ? columns : p.value_columns);
    codeword_rows.resize(backward ? columns : 0, p.depth_columns);
    exact_rows.resize(backward && p.exact ? columns : 0, p.depth_columns);
    for (Panels* panels : {&codewords, &exact_keys, &values, &codeword_rows, &exact_rows}) {
      panels->clear();
    }
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t j = first + c;
      const bool there = c < count && !keys.ignored(j);
      offsets[c] = there ? 0.0f : -kInfinity;
      if (there) {
        set(p, keys, j, c);
      }
    }
  }

 private:
  void set(const Problem& p, const Keys& keys, int64_t j, int64_t column) {
    const float* codeword = keys.codebook.row(keys.code(j), buffer.data());
    codewords.set_column(column, codeword);
    if (backward) {
      codeword_rows.set_row(column, codeword, p.depth);
    }
    if (p.exact) {
      const float* key = keys.k.row(j, buffer.data());
      exact_keys.set_column(column, key);
      if (backward) {
        exact_rows.set_row(column, key, p.depth);
      }
    }
    const float* value = keys.v.row(j, buffer.data());
    if (backward) {
      values.set_column(column, value);
    } else {
      values.set_row(column, value, p.values);
    }
  }
};

// Fills in what decides the scores of a block, except the queries' own and the bias.
inline void see(
    AttentionScores& block, const Problem& p, const Panels& codebook, const FarField& far, const NearKeys& near,
    int64_t first_key) {
  block.depth = p.depth;
  block.far_columns = far.keys > 0 ? p.far_columns : 0;
  block.near_columns = near.columns;
  block.weight = p.weight;
  block.codebook = codebook.data.get();
  block.far_offsets = far.offsets.get();
  block.far_counts = far.counts.get();
  block.codewords = near.codewords.data.get();
  block.exact_keys = p.exact && near.columns > 0 ? near.exact_keys.data.get() : nullptr;
  block.near_offsets = near.offsets.get();
  block.first_key = first_key;
  block.window = p.window;
  block.causal = p.causal;
}

}  // namespace longvq
