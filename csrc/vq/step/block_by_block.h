// Long pieces, a block of tokens at a time with the kernel of attention_kernel.h. For attention_step_cpu.cpp.
#pragma once

#include <limits>
#include <vector>

#include "../../common/aligned_array.h"
#include "call.h"

namespace longvq {

// Per thread: one block and all that it needs, and one head's codebook and far field as the kernel reads them.
struct StepBlockScratch {
  int64_t far, near, values;  // padded: codes, near keys of a block at most, E
  AlignedArray<float> queries, far_queries, keys, block_values, near_offsets, scores, exact_scores, out, total, top;
  AlignedArray<float> counts, offsets;
  Panels codebook, sums, codewords, exact_keys, near_values;
  std::vector<float> bias;     // (G, 2 W - 1)
  std::vector<int64_t> times;  // of the row's tokens that are not ignored
  int64_t codes[kBlock];

  explicit StepBlockScratch(const StepProblem& p)
      : far(round_up(p.num_codes, p.block_kernel.lanes)), near(round_up(p.most_near + kBlock, p.block_kernel.lanes)),
        values(round_up(p.values, p.block_kernel.lanes)), queries(aligned_array<float>(kBlock * p.near_depth)),
        far_queries(aligned_array<float>(p.has_far_q ? kBlock * p.far_depth : 0)),
        keys(aligned_array<float>(kBlock * p.near_depth)), block_values(aligned_array<float>(kBlock * p.values)),
        near_offsets(aligned_array<float>(near)), scores(aligned_array<float>(kBlock * (far + near))),
        exact_scores(aligned_array<float>(p.exact ? kBlock * near : 0)), out(aligned_array<float>(kBlock * values)),
        total(aligned_array<float>(kBlock)), top(aligned_array<float>(kBlock)), counts(aligned_array<float>(far)),
        offsets(aligned_array<float>(far)), codebook(p.far_depth, far, p.block_kernel.panel),
        sums(far, values, p.block_kernel.panel), codewords(p.far_depth, near, p.block_kernel.panel),
        exact_keys(p.exact ? p.near_depth : 0, near, p.block_kernel.panel),
        near_values(near, values, p.block_kernel.panel) {}
};

struct BlockByBlock {
  const StepProblem& p;
  StepHead& head;
  StepBlockScratch& s;

  BlockByBlock(StepHead& head, StepBlockScratch& scratch) : p(head.p), head(head), s(scratch) {
    s.codebook.clear();
    s.sums.clear();
    for (int64_t c = 0; c < s.far; ++c) {
      s.counts[c] = c < p.num_codes ? static_cast<float>(head.counts[c]) : 0.0f;
      s.offsets[c] = s.counts[c] > 0.0f || p.activation == Activation::kLaplace
                         ? 0.0f
                         : -std::numeric_limits<float>::infinity();  // must not set the largest score
      if (c < p.num_codes) {
        s.codebook.set_column(c, head.codeword(c));
        s.sums.set_row(c, head.sums + c * p.values, p.values);
      }
    }
    s.bias.clear();
    if (p.bias != nullptr) {  // by key - query + W - 1
      s.bias.assign(p.group * (2 * p.window - 1), 0.0f);
      for (int64_t g = 0; g < p.group; ++g) {
        for (int64_t offset = 0; offset < p.window; ++offset) {
          s.bias[g * (2 * p.window - 1) + p.window - 1 - offset] =
              p.bias[(head.kv_head * p.group + g) * p.window + offset];
        }
      }
    }
  }

  void run() {
    s.times.clear();
    for (int64_t t = 0; t < p.length; ++t) {
      if (!p.ignored(head.row, t)) {
        s.times.push_back(t);
        continue;
      }
      for (int64_t g = 0; g < p.group; ++g) {
        p.out.store_zeros(p.place(head.row, head.kv_head * p.group + g, t));
      }
    }
    const int64_t tokens = static_cast<int64_t>(s.times.size()), position = p.lengths[head.row];
    for (int64_t first = 0; first < tokens; first += kBlock) {
      block(s.times.data() + first, std::min(kBlock, tokens - first), position + first);
    }
  }

  // `rows` tokens, the first at `position`.
  void block(const int64_t* times, int64_t rows, int64_t position) {
    for (int64_t r = 0; r < rows; ++r) {
      s.codes[r] = head.given_code(times[r]);
      p.v.load(head.row, head.kv_head, times[r], 1.0f, s.block_values.get() + r * p.values);
      if (p.exact) {
        p.k.load(head.row, head.kv_head, times[r], 1.0f, s.keys.get() + r * p.near_depth);
      }
    }
    AttentionBlock block{};
    block.rows = rows;
    block.near_depth = p.near_depth;
    block.far_depth = p.far_depth;
    block.far_columns = s.far;
    block.near_columns = gather_near(rows, position);
    block.values = s.values;
    block.activation = p.activation;
    block.queries = s.queries.get();
    block.far_queries = p.has_far_q ? s.far_queries.get() : block.queries;
    block.codebook = s.codebook.data.get();
    block.far_offsets = s.offsets.get();
    block.far_counts = s.counts.get();
    block.far_values = s.sums.data.get();
    block.codewords = s.codewords.data.get();
    block.exact_keys = p.exact ? s.exact_keys.data.get() : nullptr;
    block.near_values = s.near_values.data.get();
    block.near_offsets = s.near_offsets.get();
    block.first_key = -head.in_ring(position);
    block.window = p.window;
    block.causal = true;
    block.scores = s.scores.get();
    block.exact = s.exact_scores.get();
    block.out = s.out.get();
    block.total = s.total.get();
    block.top = s.top.get();
    for (int64_t g = 0; g < p.group; ++g) {
      const int64_t query_head = head.kv_head * p.group + g;
      for (int64_t r = 0; r < rows; ++r) {
        const float unit = p.unit(position + r);
        p.q.load(head.row, query_head, times[r], unit, s.queries.get() + r * p.near_depth);
        if (p.has_far_q) {
          p.far_q.load(head.row, query_head, times[r], unit, s.far_queries.get() + r * p.far_depth);
        }
      }
      block.bias = s.bias.empty() ? nullptr : s.bias.data() + g * (2 * p.window - 1);
      p.block_kernel.forward(block);
      for (int64_t r = 0; r < rows; ++r) {
        const float factor = p.activation == Activation::kSoftmax ? 1.0f / s.total[r] : 1.0f;
        p.out.store(p.place(head.row, query_head, times[r]), s.out.get() + r * s.values, factor);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      head.push(
          position + r, s.codes[r], s.keys.get() + r * p.near_depth, s.block_values.get() + r * p.values,
          [this](int64_t code, const float* value) {
            head.add_far(code, value);
            s.sums.add_to_row(code, value, p.values);
            s.counts[code] = static_cast<float>(head.counts[code]);
            s.offsets[code] = 0.0f;
          });
    }
  }

  // The ring, oldest first, then the block; returns their padded number.
  int64_t gather_near(int64_t rows, int64_t position) {
    const int64_t ring = head.in_ring(position), count = ring + rows, columns = round_up(count, p.block_kernel.lanes);
    // The panels of this block are those of a matrix with `columns` columns.
    s.codewords.resize(p.far_depth, columns);
    s.exact_keys.resize(s.exact_keys.depth, columns);
    s.near_values.resize(columns, s.values);
    for (Panels* panels : {&s.codewords, &s.exact_keys, &s.near_values}) {
      panels->clear();
    }
    for (int64_t c = 0; c < columns; ++c) {
      s.near_offsets[c] = c < count ? 0.0f : -std::numeric_limits<float>::infinity();
    }
    for (int64_t c = 0; c < count; ++c) {
      const bool old = c < ring;
      const int64_t i = old ? head.slot(position, ring - c) : c - ring;
      s.codewords.set_column(c, head.codeword(old ? head.ring_codes[i] : s.codes[i]));
      if (p.exact) {
        s.exact_keys.set_column(c, (old ? head.ring_keys : s.keys.get()) + i * p.near_depth);
      }
      s.near_values.set_row(c, (old ? head.ring_values : s.block_values.get()) + i * p.values, p.values);
    }
    return columns;
  }
};

}  // namespace longvq
