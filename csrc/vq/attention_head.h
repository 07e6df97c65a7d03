// Forward of one head of one document, block of queries by block. For attention_cpu.cpp.
#pragma once

#include <cmath>

#include "attention_keys.h"

namespace longvq {

constexpr int64_t kBlock = 72;  // queries of a block, a multiple of the rows of every kernel

// Per thread: one block and all that it needs.
struct Scratch {
  AlignedArray<float> queries, scores, exact_scores, out, total, top;
  NearKeys near;
  std::vector<float> buffer;

  explicit Scratch(const Problem& p)
      : queries(aligned_array<float>(kBlock * p.depth)),
        scores(aligned_array<float>(kBlock * (p.far_columns + p.near_columns(kBlock)))),
        exact_scores(aligned_array<float>(p.exact ? kBlock * p.near_columns(kBlock) : 0)),
        out(aligned_array<float>(kBlock * p.value_columns)), total(aligned_array<float>(kBlock)),
        top(aligned_array<float>(kBlock)), near(p, p.near_columns(kBlock), false), buffer(p.depth) {}
};

// What a first pass over a document has left for a second: numerators, denominators and largest scores until then.
enum class Pass { kOnly, kFirst, kSecond };

struct Head {
  const Problem& p;
  void* out;   // (B, H, L, E)
  float* lse;  // (B, H, L)
  Document document;
  int64_t length, kv_head;
  Keys keys;
  Panels codebook;
  std::vector<std::vector<float>> bias;  // of each query head of the group
  std::vector<float> units;
  std::vector<float> numerators, totals;  // (group, L, E) and (group, L), between two passes

  Head(const Problem& p, void* out, float* lse, const Document& document, int64_t kv_head)
      : p(p), out(out), lse(lse), document(document), length(document.length), kv_head(kv_head),
        keys(p, document, kv_head), codebook(pack_codebook(p, keys, false)), units(units_of(p, document, keys)) {
    for (int64_t g = 0; g < p.group; ++g) {
      bias.push_back(bias_of(p, kv_head * p.group + g));
    }
  }

  void attend(int64_t first, int64_t last, const FarField& far, int64_t near_first, int64_t near_last, Pass pass,
              Scratch& scratch) {
    AttentionBlock block{};
    scratch.near.gather(p, keys, near_first, near_last);
    see(block, p, codebook, far, scratch.near, near_first - first);
    block.rows = last - first;
    block.queries = scratch.queries.get();
    block.values = p.value_columns;
    block.far_values = far.sums.data.get();
    block.near_values = scratch.near.values.data.get();
    block.scores = scratch.scores.get();
    block.exact = scratch.exact_scores.get();
    block.out = scratch.out.get();
    block.total = scratch.total.get();
    block.top = scratch.top.get();
    for (int64_t g = 0; g < p.group; ++g) {
      const Matrix q = p.matrix_of(p.q, document, kv_head * p.group + g);
      for (int64_t i = first; i < last; ++i) {
        const float unit = units.empty() ? p.scale : units[i];
        const float* query = q.row(i, scratch.buffer.data());
        for (int64_t d = 0; d < p.depth; ++d) {
          scratch.queries[(i - first) * p.depth + d] = unit * query[d];
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

  void finish(int64_t g, int64_t i, float* sums, float total, float top, Pass pass) {
    const int64_t place = p.place(document, kv_head * p.group + g, p.heads) + i;
    const bool softmax = p.weight == AttentionWeight::kSoftmax;
    if (total == 0.0f) {
      top = -std::numeric_limits<float>::max();  // no key: whatever the other pass has found weighs more
    }
    if (pass == Pass::kFirst) {
      std::copy_n(sums, p.values, numerators.data() + (g * length + i) * p.values);
      totals[g * length + i] = total;
      lse[place] = top;
      return;
    }
    if (pass == Pass::kSecond) {
      const float other = lse[place], larger = std::max(top, other);
      const float own = softmax ? std::exp(top - larger) : 1.0f, before = softmax ? std::exp(other - larger) : 1.0f;
      const float* first = numerators.data() + (g * length + i) * p.values;
      for (int64_t e = 0; e < p.values; ++e) {
        sums[e] = sums[e] * own + first[e] * before;
      }
      total = total * own + totals[g * length + i] * before;
      top = larger;
    }
    float factor = keys.ignored(i) ? 0.0f : 1.0f;
    lse[place] = 0.0f;
    if (softmax) {
      lse[place] = total == 0.0f ? kInfinity : top + std::log(total);
      factor = total == 0.0f ? 0.0f : factor / total;
    }
    for (int64_t e = 0; e < p.values; ++e) {
      sums[e] = factor == 0.0f ? 0.0f : sums[e] * factor;
    }
    store_row(sums, p.values, element_at(out, p.type, place * p.values), p.type, 1);
  }

  // Blocks in order; the far field grows with them.
  void from_start(FarField& far, Scratch& scratch) {
    const bool two_passes = !p.causal;
    if (two_passes) {
      numerators.assign(p.group * length * p.values, 0.0f);
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
