// The keys of a block of queries as the kernels read them: the packed codebook and the near keys.
#pragma once

#include <algorithm>
#include <vector>

#include "far_field.h"

namespace longvq {

// The codebooks of all key-value heads, packed once for all documents.
struct Codebooks {
  std::vector<Panels> columns;  // panels (F, far_columns)
  std::vector<Panels> rows;     // panels (far_columns, far_head_columns), only for the backward

  Codebooks(const AttentionCall& call, bool backward) {
    std::vector<float> buffer(call.far_head_dim);
    for (int64_t head = 0; head < call.kv_heads; ++head) {
      columns.emplace_back(call.far_head_dim, call.far_columns, call.kernel.panel).clear();
      if (backward) {
        rows.emplace_back(call.far_columns, call.far_head_columns, call.kernel.panel).clear();
      }
      const Matrix codebook = codebook_of(call, head);
      for (int64_t code = 0; code < call.num_codes; ++code) {
        const float* codeword = codebook.row(code, buffer.data());
        columns[head].set_column(code, codeword);
        if (backward) {
          rows[head].set_row(code, codeword, call.far_head_dim);
        }
      }
    }
  }
};

// The near keys of a block, packed. The backward needs the keys both as columns and as rows of panels.
struct NearKeys {
  int64_t first = 0, columns = 0;  // position of the first near key; padded number of near keys
  Panels codewords, exact_keys, values;
  Panels codeword_rows, exact_rows;
  AlignedArray<float> offsets;
  bool backward;

  NearKeys(const AttentionCall& call, int64_t max_columns, bool backward)
      : codewords(call.far_head_dim, max_columns, call.kernel.panel),
        exact_keys(call.uses_exact_keys ? call.head_dim : 0, max_columns, call.kernel.panel),
        values(backward ? call.value_dim : max_columns, backward ? max_columns : call.value_columns, call.kernel.panel),
        codeword_rows(backward ? max_columns : 0, call.far_head_columns, call.kernel.panel),
        exact_rows(backward && call.uses_exact_keys ? max_columns : 0, call.head_columns, call.kernel.panel),
        offsets(aligned_array<float>(max_columns)), backward(backward), rows_(max_columns),
        zeros_(std::max({call.head_dim, call.far_head_dim, call.value_dim})),
        converted_(aligned_array<float>(max_columns * std::max({call.head_dim, call.far_head_dim, call.value_dim}))) {}

  // Packs the near keys of queries first_query .. last_query.
  void gather(const AttentionCall& call, const Keys& keys, int64_t first_query, int64_t last_query, int64_t length) {
    first = call.everything_far() ? 0 : std::max<int64_t>(0, first_query - call.reach);
    const int64_t last = call.everything_far() ? 0
                         : call.causal         ? last_query
                                               : std::min(length, last_query + call.reach);
    const int64_t count = last - first;
    columns = round_up(count, call.kernel.lanes);
    codewords.resize(call.far_head_dim, columns);
    exact_keys.resize(exact_keys.depth, columns);
    values.resize(backward ? call.value_dim : columns, backward ? columns : call.value_columns);
    codeword_rows.resize(backward ? columns : 0, call.far_head_columns);
    exact_rows.resize(backward && call.uses_exact_keys ? columns : 0, call.head_columns);
    for (int64_t c = 0; c < columns; ++c) {
      offsets[c] = c < count && !keys.ignored(first + c) ? 0.0f : -kInfinity;
    }
    find_rows(keys.codebook, [&](int64_t j) { return keys.code(j); });
    as_columns(call, codewords);
    if (backward) {
      as_rows(call.far_head_dim, codeword_rows);
    }
    if (call.uses_exact_keys) {
      find_rows(keys.k, [](int64_t j) { return j; });
      as_columns(call, exact_keys);
      if (backward) {
        as_rows(call.head_dim, exact_rows);
      }
    }
    find_rows(keys.v, [](int64_t j) { return j; });
    if (backward) {
      as_columns(call, values);
    } else {
      as_rows(call.value_dim, values);
    }
  }

 private:
  // Points rows_ to the rows of the near keys in a matrix. Masked keys and padding get rows of zeros.
  template <typename Index>
  void find_rows(const Matrix& matrix, const Index& index_of) {
    for (int64_t c = 0; c < columns; ++c) {
      rows_[c] =
          offsets[c] == 0.0f ? matrix.row(index_of(first + c), converted_.get() + c * matrix.columns) : zeros_.data();
    }
  }

  void as_columns(const AttentionCall& call, Panels& panels) const {
    call.kernel.pack_columns(rows_.data(), columns, panels.depth, panels.data.get());
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

// Sets the members of AttentionScores except the queries and the bias.
inline void set_score_inputs(
    AttentionScores& block, const AttentionCall& call, const Panels& codebook, const FarField& far,
    const NearKeys& near, int64_t first_query) {
  block.head_dim = call.head_dim;
  block.far_head_dim = call.far_head_dim;
  block.far_columns = far.keys > 0 ? call.far_columns : 0;
  block.near_columns = near.columns;
  block.activation = call.activation;
  block.codebook = codebook.data.get();
  block.far_offsets = far.offsets.get();
  block.far_counts = far.counts.get();
  block.codewords = near.codewords.data.get();
  block.exact_keys = call.uses_exact_keys && near.columns > 0 ? near.exact_keys.data.get() : nullptr;
  block.near_offsets = near.offsets.get();
  block.first_key = near.first - first_query;
  block.window = call.window;
  block.causal = call.causal;
}

}  // namespace longvq
