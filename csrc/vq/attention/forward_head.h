// Forward of one head of one document, block of queries by block. For attention_cpu.cpp.
#pragma once

#include "near_keys.h"

namespace longvq {

// Per thread: one block and all that it needs.
struct Scratch {
  AlignedArray<float> queries, far_queries, scores, exact_scores, out, total, top;
  NearKeys near;
  FarField far;
  std::vector<float> buffer;

  explicit Scratch(const Problem& p)
      : queries(aligned_array<float>(kBlock * p.near_depth)),
        far_queries(aligned_array<float>(p.has_far_q ? kBlock * p.far_depth : 0)),
        scores(aligned_array<float>(kBlock * (p.far_columns + p.near_columns(kBlock)))),
        exact_scores(aligned_array<float>(p.exact ? kBlock * p.near_columns(kBlock) : 0)),
        out(aligned_array<float>(kBlock * p.value_columns)), total(aligned_array<float>(kBlock)),
        top(aligned_array<float>(kBlock)), near(p, p.near_columns(kBlock), false), far(p, Sums::kPanels),
        buffer(std::max(p.near_depth, p.far_depth)) {}
};

struct Head {
  const Problem& p;
  void* out;           // (B, H, L, E)
  float* normalizers;  // (B, H, L, 2)
  Document document;
  int64_t length, kv_head;
  Keys keys;
  const Panels& codebook;
  std::vector<std::vector<float>> bias;  // of each query head of the group
  std::vector<float> units;
  FarFields fields;

  Head(
      const Problem& p, const Codebooks& codebooks, void* out, float* normalizers, const Document& document,
      int64_t kv_head)
      : p(p), out(out), normalizers(normalizers), document(document), length(document.length), kv_head(kv_head),
        keys(p, document, kv_head), codebook(codebooks.columns[kv_head]), units(units_of(p, document, keys)),
        fields(p, keys, document.length, Sums::kPanels) {
    for (int64_t g = 0; g < p.group; ++g) {
      bias.push_back(bias_of(p, kv_head * p.group + g));
    }
  }

  Head(const Head&) = delete;  // the far fields refer to the keys

  void attend(int64_t number, Scratch& scratch) const {
    const int64_t first = number * kBlock, last = std::min(first + kBlock, length);
    const FarField& far = fields.of_block(number, scratch.far);
    AttentionBlock block{};
    scratch.near.gather(p, keys, first, last, length);
    see(block, p, codebook, far, scratch.near, first);
    block.rows = last - first;
    block.queries = scratch.queries.get();
    block.far_queries = p.has_far_q ? scratch.far_queries.get() : block.queries;
    block.values = p.value_columns;
    block.far_values = far.sums.data.get();
    block.near_values = scratch.near.values.data.get();
    block.scores = scratch.scores.get();
    block.exact = scratch.exact_scores.get();
    block.out = scratch.out.get();
    block.total = scratch.total.get();
    block.top = scratch.top.get();
    for (int64_t g = 0; g < p.group; ++g) {
      load(p.q, g, first, last, scratch.buffer.data(), scratch.queries.get());
      if (p.has_far_q) {
        load(p.far_q, g, first, last, scratch.buffer.data(), scratch.far_queries.get());
      }
      block.bias = bias[g].empty() ? nullptr : bias[g].data();
      p.kernel.forward(block);
      for (int64_t i = first; i < last; ++i) {
        const int64_t r = i - first;
        finish(g, i, scratch.out.get() + r * p.value_columns, scratch.total[r], scratch.top[r]);
      }
    }
  }

  // Queries first .. last of q or far_q, times the factor of their scores.
  void load(const Tensor& queries, int64_t g, int64_t first, int64_t last, float* buffer, float* out_rows) const {
    const Matrix matrix = p.matrix_of(queries, document, kv_head * p.group + g);
    for (int64_t i = first; i < last; ++i) {
      const float unit = units.empty() ? p.scale : units[i];
      const float* query = matrix.row(i, buffer);
      for (int64_t d = 0; d < matrix.columns; ++d) {
        *out_rows++ = unit * query[d];
      }
    }
  }

  void finish(int64_t g, int64_t i, float* sums, float total, float top) const {
    const int64_t place = p.place(document, kv_head * p.group + g, p.heads) + i;
    total = total == 0.0f ? 1.0f : total;  // no key: all sums are 0; laplace: not normalised
    normalizers[2 * place] = top;
    normalizers[2 * place + 1] = total;
    const float factor = keys.ignored(i) ? 0.0f : 1.0f / total;
    for (int64_t e = 0; e < p.values; ++e) {
      sums[e] = factor == 0.0f ? 0.0f : sums[e] * factor;
    }
    store_row(sums, p.values, element_at(out, p.type, place * p.values), p.type, 1);
  }
};

}  // namespace longvq
