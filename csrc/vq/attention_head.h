// One head of one document: its keys, the field of its far ones, and its queries block by block. For attention_cpu.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "attention_kernel.h"
#include "panels.h"

namespace longvq {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kBlock = 72;  // queries of a block, a multiple of the rows of every kernel
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Positions start .. start + length of batch row `row`, which are attended by themselves: a whole row, or a part of the
// one row that holds several packed documents.
struct Document {
  int64_t row, start, length;
};

struct Problem {
  const Tensor &q, &k, &v, &codebook, &codes;
  const OptionalTensor &bias, &mask;
  std::vector<Document> documents;
  float scale;
  bool causal;
  int64_t window;
  AttentionWeight weight;
  bool exact;
  int64_t batch, heads, kv_heads, group, length, depth, values, num_codes;
  int64_t reach;  // keys further than this from a block are far from all of it
  const AttentionKernel& kernel;
  int64_t far_columns, value_columns, near_columns;  // padded; near: the most that a block has
  float* out;
  float* lse;

  bool everything_far() const { return window == 0 && !causal; }

  Matrix matrix_of(const Tensor& x, const Document& document, int64_t head) const {
    return {static_cast<const float*>(x.const_data_ptr()) + document.row * x.stride(0) + head * x.stride(1) +
                document.start * x.stride(2),
            x.stride(2), x.stride(3)};
  }

  const bool* masked(const Document& document) const {
    return mask.has_value() ? static_cast<const bool*>(mask->const_data_ptr()) + document.row * mask->stride(0) +
                                  document.start * mask->stride(1)
                            : nullptr;
  }
  int64_t mask_stride() const { return mask.has_value() ? mask->stride(1) : 0; }
};

// The keys of one document and key-value head.
struct Keys {
  Matrix k, v, codebook;
  const int64_t* codes;
  int64_t code_stride;
  const bool* masked;
  int64_t mask_stride;

  Keys(const Problem& p, const Document& document, int64_t head)
      : k(p.matrix_of(p.k, document, head)), v(p.matrix_of(p.v, document, head)),
        codebook{static_cast<const float*>(p.codebook.const_data_ptr()) + head * p.codebook.stride(0),
                 p.codebook.stride(1), p.codebook.stride(2)},
        codes(static_cast<const int64_t*>(p.codes.const_data_ptr()) + document.row * p.codes.stride(0) +
              head * p.codes.stride(1) + document.start * p.codes.stride(2)),
        code_stride(p.codes.stride(2)), masked(p.masked(document)), mask_stride(p.mask_stride()) {}

  int64_t code(int64_t j) const { return codes[j * code_stride]; }
  bool ignored(int64_t j) const { return masked != nullptr && masked[j * mask_stride]; }
};

// Numbers of the far keys of each code and sums of their values.
struct FarField {
  Panels sums;
  AlignedArray<float> counts, offsets;
  int64_t keys = 0;

  explicit FarField(const Problem& p)
      : sums(p.far_columns, p.value_columns, p.kernel.panel), counts(aligned_array<float>(p.far_columns)),
        offsets(aligned_array<float>(p.far_columns)) {
    clear(p);
  }

  void clear(const Problem& p) {
    sums.clear();
    std::fill_n(counts.get(), p.far_columns, 0.0f);
    // Under softmax a code without a far key must not set the largest score.
    std::fill_n(offsets.get(), p.far_columns, p.weight == AttentionWeight::kSoftmax ? -kInfinity : 0.0f);
    keys = 0;
  }

  void add(const Problem& p, const Keys& of, int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j) {
      if (!of.ignored(j)) {
        const int64_t code = of.code(j);
        sums.add_to_row(code, of.v.row(j), of.v.column_stride, p.values);
        counts[code] += 1.0f;
        offsets[code] = 0.0f;
        ++keys;
      }
    }
  }
};

inline Panels pack_codebook(const Problem& p, int64_t head) {
  Panels panels(p.depth, p.far_columns, p.kernel.panel);
  panels.clear();
  const Tensor& c = p.codebook;
  const float* data = static_cast<const float*>(c.const_data_ptr()) + head * c.stride(0);
  for (int64_t code = 0; code < p.num_codes; ++code) {
    panels.set_column(code, data + code * c.stride(1), c.stride(2));
  }
  return panels;
}

// Per thread: one block and all that it needs.
struct Scratch {
  AlignedArray<float> queries, near_offsets, scores, exact_scores, out, total, top;
  Panels codewords, exact_keys, near_values;

  explicit Scratch(const Problem& p)
      : queries(aligned_array<float>(kBlock * p.depth)), near_offsets(aligned_array<float>(p.near_columns)),
        scores(aligned_array<float>(kBlock * (p.far_columns + p.near_columns))),
        exact_scores(aligned_array<float>(p.exact ? kBlock * p.near_columns : 0)),
        out(aligned_array<float>(kBlock * p.value_columns)), total(aligned_array<float>(kBlock)),
        top(aligned_array<float>(kBlock)),
        codewords(p.depth, p.near_columns, p.kernel.panel),
        exact_keys(p.exact ? p.depth : 0, p.near_columns, p.kernel.panel),
        near_values(p.near_columns, p.value_columns, p.kernel.panel) {}
};

// Near keys first .. last into the scratch; returns their padded number.
inline int64_t gather_near(const Problem& p, const Keys& keys, int64_t first, int64_t last, Scratch& scratch) {
  const int64_t count = last - first, columns = round_up(count, p.kernel.lanes);
  // The panels of this block are those of a matrix with `columns` columns.
  for (Panels* panels : {&scratch.codewords, &scratch.exact_keys}) {
    panels->columns = columns;
    std::fill_n(panels->data.get(), panels->depth * columns, 0.0f);
  }
  scratch.near_values.depth = columns;
  scratch.near_values.clear();
  for (int64_t c = 0; c < columns; ++c) {
    scratch.near_offsets[c] = c < count && !keys.ignored(first + c) ? 0.0f : -kInfinity;
  }
  for (int64_t c = 0; c < count; ++c) {
    const int64_t j = first + c;
    if (keys.ignored(j)) {
      continue;
    }
    scratch.codewords.set_column(c, keys.codebook.row(keys.code(j)), keys.codebook.column_stride);
    if (p.exact) {
      scratch.exact_keys.set_column(c, keys.k.row(j), keys.k.column_stride);
    }
    scratch.near_values.set_row(c, keys.v.row(j), keys.v.column_stride, p.values);
  }
  return columns;
}

// What the windows' biases look like to the kernel: by key - query + W - 1.
inline std::vector<float> bias_of(const Problem& p, int64_t head) {
  std::vector<float> values;
  if (p.bias.has_value() && p.window > 0) {
    values.assign(2 * p.window - 1, 0.0f);
    const float* data = static_cast<const float*>(p.bias->const_data_ptr()) + head * p.bias->stride(0);
    // Of a window wider than the sequence the middle is left.
    const int64_t cut = p.causal ? 0 : (p.bias->size(1) + 1) / 2 - p.window;
    for (int64_t i = 0; i < (p.causal ? p.window : 2 * p.window - 1); ++i) {
      values[p.causal ? p.window - 1 - i : i] = data[(i + cut) * p.bias->stride(1)];
    }
  }
  return values;
}

// One over the number of keys that each query may attend, for laplace.
inline std::vector<float> units_of(const Problem& p, const Document& document) {
  std::vector<float> units(document.length);
  const bool* masked = p.masked(document);
  int64_t count = 0;
  for (int64_t i = 0; i < document.length; ++i) {
    count += masked == nullptr || !masked[i * p.mask_stride()];
    units[i] = 1.0f / static_cast<float>(std::max<int64_t>(count, 1));
  }
  if (!p.causal && document.length > 0) {
    std::fill(units.begin(), units.end(), units.back());
  }
  return units;
}

// What a first pass over a document has left for a second: out and lse hold numerators and largest scores until then.
enum class Pass { kOnly, kFirst, kSecond };

struct Head {
  const Problem& p;
  Document document;
  int64_t length, kv_head;
  Keys keys;
  Panels codebook;
  std::vector<std::vector<float>> bias;  // of each query head of the group
  std::vector<float> units;
  std::vector<float> totals;  // (group, L) denominators between two passes

  Head(const Problem& p, const Document& document, int64_t kv_head)
      : p(p), document(document), length(document.length), kv_head(kv_head), keys(p, document, kv_head),
        codebook(pack_codebook(p, kv_head)) {
    for (int64_t g = 0; g < p.group; ++g) {
      bias.push_back(bias_of(p, kv_head * p.group + g));
    }
    if (p.weight == AttentionWeight::kLaplace) {
      units = units_of(p, document);
    }
  }

  void attend(int64_t first, int64_t last, const FarField& far, int64_t near_first, int64_t near_last, Pass pass,
              Scratch& scratch) {
    AttentionBlock block{};
    block.rows = last - first;
    block.depth = p.depth;
    block.far_columns = far.keys > 0 ? p.far_columns : 0;
    block.near_columns = near_last > near_first ? gather_near(p, keys, near_first, near_last, scratch) : 0;
    block.values = p.value_columns;
    block.weight = p.weight;
    block.queries = scratch.queries.get();
    block.codebook = codebook.data.get();
    block.far_offsets = far.offsets.get();
    block.far_counts = far.counts.get();
    block.far_values = far.sums.data.get();
    block.codewords = scratch.codewords.data.get();
    block.exact_keys = p.exact && block.near_columns > 0 ? scratch.exact_keys.data.get() : nullptr;
    block.near_values = scratch.near_values.data.get();
    block.near_offsets = scratch.near_offsets.get();
    block.first_key = near_first - first;
    block.window = p.window;
    block.causal = p.causal;
    block.scores = scratch.scores.get();
    block.exact = scratch.exact_scores.get();
    block.out = scratch.out.get();
    block.total = scratch.total.get();
    block.top = scratch.top.get();
    for (int64_t g = 0; g < p.group; ++g) {
      const int64_t head = kv_head * p.group + g;
      const Matrix q = p.matrix_of(p.q, document, head);
      for (int64_t i = first; i < last; ++i) {
        const float unit = units.empty() ? p.scale : units[i];
        for (int64_t d = 0; d < p.depth; ++d) {
          scratch.queries[(i - first) * p.depth + d] = unit * q.row(i)[d * q.column_stride];
        }
      }
      block.bias = bias[g].empty() ? nullptr : bias[g].data();
      p.kernel.forward(block);
      for (int64_t i = first; i < last; ++i) {
        const int64_t r = i - first;
        finish(g, i, scratch.out.get() + r * p.value_columns, scratch.total[r], scratch.top[r], pass);
      }
    }
  }

  void finish(int64_t g, int64_t i, const float* sums, float total, float top, Pass pass) {
    const int64_t place = (document.row * p.heads + kv_head * p.group + g) * p.length + document.start + i;
    float* out = p.out + place * p.values;
    float own = 1.0f, before = 0.0f;
    if (total == 0.0f) {
      top = -std::numeric_limits<float>::max();  // no key: whatever the other pass has found weighs more
    }
    if (pass == Pass::kSecond) {
      const float other = p.lse[place], larger = std::max(top, other);
      own = p.weight == AttentionWeight::kSoftmax ? std::exp(top - larger) : 1.0f;
      before = p.weight == AttentionWeight::kSoftmax ? std::exp(other - larger) : 1.0f;
      total = total * own + totals[g * length + i] * before;
      top = larger;
    }
    for (int64_t e = 0; e < p.values; ++e) {
      out[e] = sums[e] * own + (pass == Pass::kSecond ? out[e] * before : 0.0f);
    }
    if (pass == Pass::kFirst) {
      totals[g * length + i] = total;
      p.lse[place] = top;
      return;
    }
    float factor = keys.ignored(i) ? 0.0f : 1.0f;
    p.lse[place] = 0.0f;
    if (p.weight == AttentionWeight::kSoftmax) {
      p.lse[place] = total == 0.0f ? kInfinity : top + std::log(total);
      factor = total == 0.0f ? 0.0f : factor / total;
    }
    for (int64_t e = 0; e < p.values; ++e) {
      out[e] = factor == 0.0f ? 0.0f : out[e] * factor;
    }
  }

  // Blocks in order; the far field grows with them.
  void from_start(FarField& far, Scratch& scratch) {
    const bool two_passes = !p.causal;
    if (two_passes) {
      totals.assign(p.group * length, 0.0f);
    }
    int64_t added = 0;
    for (int64_t first = 0; first < length; first += kBlock) {
      const int64_t last = std::min(first + kBlock, length), near_first = std::max<int64_t>(0, first - p.reach);
      far.add(p, keys, added, near_first);
      added = near_first;
      const int64_t near_last = p.causal ? last : std::min(length, last + p.reach);
      attend(first, last, far, near_first, near_last, two_passes ? Pass::kFirst : Pass::kOnly, scratch);
    }
  }

  // Bidirectional: blocks from the end see what is far behind them.
  void from_end(FarField& far, Scratch& scratch) {
    far.clear(p);
    int64_t added = length;
    for (int64_t first = (length - 1) / kBlock * kBlock; first >= 0; first -= kBlock) {
      const int64_t last = std::min(first + kBlock, length), far_first = std::min(length, last + p.reach);
      far.add(p, keys, far_first, added);
      added = far_first;
      attend(first, last, far, 0, 0, Pass::kSecond, scratch);
    }
  }
};

}  // namespace longvq
