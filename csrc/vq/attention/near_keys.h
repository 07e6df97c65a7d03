// What a block of queries sees: the codebook, the keys near it one by one, and all others through their codes.
#pragma once

#include <algorithm>
#include <vector>

#include "far_field.h"

namespace longvq {

// The codebook of each key-value head, packed once for all documents.
struct Codebooks {
  std::vector<Panels> columns, rows;  // (F, far_columns); for the backward also (far_columns, far_depth_columns)

  Codebooks(const Problem& p, bool backward) {
    std::vector<float> buffer(p.far_depth);
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      columns.emplace_back(p.far_depth, p.far_columns, p.kernel.panel).clear();
      if (backward) {
        rows.emplace_back(p.far_columns, p.far_depth_columns, p.kernel.panel).clear();
      }
      const Matrix codebook = codebook_of(p, head);
      for (int64_t code = 0; code < p.num_codes; ++code) {
        const float* codeword = codebook.row(code, buffer.data());
        columns[head].set_column(code, codeword);
        if (backward) {
          rows[head].set_row(code, codeword, p.far_depth);
        }
      }
    }
  }
};

// The near keys of a block as the kernels read them. Those of the backward have both layouts.
struct NearKeys {
  int64_t first = 0, columns = 0;  // position of the first; their padded number
  Panels codewords, exact_keys, values;
  Panels codeword_rows, exact_rows;
  AlignedArray<float> offsets;
  bool backward;

  NearKeys(const Problem& p, int64_t most, bool backward)
      : codewords(p.far_depth, most, p.kernel.panel), exact_keys(p.exact ? p.near_depth : 0, most, p.kernel.panel),
        values(backward ? p.values : most, backward ? most : p.value_columns, p.kernel.panel),
        codeword_rows(backward ? most : 0, p.far_depth_columns, p.kernel.panel),
        exact_rows(backward && p.exact ? most : 0, p.near_depth_columns, p.kernel.panel),
        offsets(aligned_array<float>(most)), backward(backward), rows_(most),
        zeros_(std::max({p.near_depth, p.far_depth, p.values})),
        converted_(aligned_array<float>(most * std::max({p.near_depth, p.far_depth, p.values}))) {}

  // Of the block of queries first_query .. last_query.
  void gather(const Problem& p, const Keys& keys, int64_t first_query, int64_t last_query, int64_t length) {
    first = p.everything_far() ? 0 : std::max<int64_t>(0, first_query - p.reach);
    const int64_t last = p.everything_far() ? 0 : p.causal ? last_query : std::min(length, last_query + p.reach);
    const int64_t count = last - first;
    columns = round_up(count, p.kernel.lanes);
    codewords.resize(p.far_depth, columns);
    exact_keys.resize(exact_keys.depth, columns);
    values.resize(backward ? p.values : columns, backward ? columns : p.value_columns);
    codeword_rows.resize(backward ? columns : 0, p.far_depth_columns);
    exact_rows.resize(backward && p.exact ? columns : 0, p.near_depth_columns);
    for (int64_t c = 0; c < columns; ++c) {
      offsets[c] = c < count && !keys.ignored(first + c) ? 0.0f : -kInfinity;
    }
    find_rows(keys.codebook, [&](int64_t j) { return keys.code(j); });
    as_columns(p, codewords);
    if (backward) {
      as_rows(p.far_depth, codeword_rows);
    }
    if (p.exact) {
      find_rows(keys.k, [](int64_t j) { return j; });
      as_columns(p, exact_keys);
      if (backward) {
        as_rows(p.near_depth, exact_rows);
      }
    }
    find_rows(keys.v, [](int64_t j) { return j; });
    if (backward) {
      as_columns(p, values);
    } else {
      as_rows(p.values, values);
    }
  }

 private:
  // Where the rows of the near keys are; zeros for masked keys and padding.
  template <typename Index>
  void find_rows(const Matrix& matrix, const Index& index_of) {
    for (int64_t c = 0; c < columns; ++c) {
      rows_[c] =
          offsets[c] == 0.0f ? matrix.row(index_of(first + c), converted_.get() + c * matrix.columns) : zeros_.data();
    }
  }

  void as_columns(const Problem& p, Panels& panels) const {
    p.kernel.pack_columns(rows_.data(), columns, panels.depth, panels.data.get());
  }

  void as_rows(int64_t count, Panels& panels) const {
    if (panels.columns > count) {
      panels.clear();
    }
    for (int64_t c = 0; c < columns; ++c) {
      panels.set_row(c, rows_[c], count);
    }
  }

  std::vector<const float*> rows_;
  std::vector<float> zeros_;
  AlignedArray<float> converted_;
};

// Fills in what decides the scores of a block, except the queries' own and the bias.
inline void see(
    AttentionScores& block, const Problem& p, const Panels& codebook, const FarField& far, const NearKeys& near,
    int64_t first_query) {
  block.near_depth = p.near_depth;
  block.far_depth = p.far_depth;
  block.far_columns = far.keys > 0 ? p.far_columns : 0;
  block.near_columns = near.columns;
  block.activation = p.activation;
  block.codebook = codebook.data.get();
  block.far_offsets = far.offsets.get();
  block.far_counts = far.counts.get();
  block.codewords = near.codewords.data.get();
  block.exact_keys = p.exact && near.columns > 0 ? near.exact_keys.data.get() : nullptr;
  block.near_offsets = near.offsets.get();
  block.first_key = near.first - first_query;
  block.window = p.window;
  block.causal = p.causal;
}

}  // namespace longvq
