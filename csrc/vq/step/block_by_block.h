// Long inputs: one block of tokens at a time, with the kernel of attention/kernel/attention_kernel.h. For step.cpp.
#pragma once

#include <vector>

#include "../../common/aligned_array.h"
#include "../../common/numbers.h"
#include "../attention/block_buffers.h"
#include "call.h"

namespace longvq {

// Buffers of a thread: one block of tokens, and the packed codebook and far field of one head.
struct BlockScratch : BlockBuffers {
  AlignedArray<float> keys, block_values, near_offsets, counts, offsets;
  Panels codebook, sums, codewords, exact_keys, near_values;
  std::vector<float> bias;     // (G, 2 W - 1)
  std::vector<int64_t> times;  // indices of the tokens that are not masked
  int64_t codes[kBlock];

  explicit BlockScratch(const StepCall& call)
      : BlockBuffers(
            call, round_up(call.num_codes, call.block_kernel.lanes),
            round_up(call.max_ring + kBlock, call.block_kernel.lanes),
            round_up(call.value_dim, call.block_kernel.lanes)),
        keys(aligned_array<float>(kBlock * call.head_dim)), block_values(aligned_array<float>(kBlock * call.value_dim)),
        near_offsets(aligned_array<float>(near_columns)), counts(aligned_array<float>(far_columns)),
        offsets(aligned_array<float>(far_columns)), codebook(call.far_head_dim, far_columns, call.block_kernel.panel),
        sums(far_columns, value_columns, call.block_kernel.panel),
        codewords(call.far_head_dim, near_columns, call.block_kernel.panel),
        exact_keys(call.uses_exact_keys ? call.head_dim : 0, near_columns, call.block_kernel.panel),
        near_values(near_columns, value_columns, call.block_kernel.panel) {}
};

struct BlockByBlock {
  const StepCall& call;
  StepHead& head;
  BlockScratch& s;

  BlockByBlock(StepHead& head, BlockScratch& scratch) : call(head.call), head(head), s(scratch) {
    s.codebook.clear();
    s.sums.clear();
    for (int64_t c = 0; c < s.far_columns; ++c) {
      s.counts[c] = c < call.num_codes ? static_cast<float>(head.counts[c]) : 0.0f;
      s.offsets[c] = s.counts[c] > 0.0f || call.activation == Activation::kLaplace
                         ? 0.0f
                         : -kInfinity;  // an unused code must not become the largest score
      if (c < call.num_codes) {
        s.codebook.set_column(c, head.codeword(c));
        s.sums.set_row(c, head.sums + c * call.value_dim, call.value_dim);
      }
    }
    s.bias.clear();
    if (call.bias != nullptr) {  // by key - query + W - 1, as the kernel reads it
      s.bias.assign(call.group * (2 * call.window - 1), 0.0f);
      for (int64_t g = 0; g < call.group; ++g) {
        for (int64_t offset = 0; offset < call.window; ++offset) {
          s.bias[g * (2 * call.window - 1) + call.window - 1 - offset] =
              call.bias[(head.kv_head * call.group + g) * call.window + offset];
        }
      }
    }
  }

  void run() {
    s.times.clear();
    for (int64_t t = 0; t < call.length; ++t) {
      if (!call.ignored(head.row, t)) {
        s.times.push_back(t);
        continue;
      }
      for (int64_t g = 0; g < call.group; ++g) {
        call.out.store_zeros(call.output_row(head.row, head.kv_head * call.group + g, t));
      }
    }
    const int64_t tokens = static_cast<int64_t>(s.times.size()), position = call.lengths[head.row];
    for (int64_t first = 0; first < tokens; first += kBlock) {
      block(s.times.data() + first, std::min(kBlock, tokens - first), position + first);
    }
  }

  // Processes `rows` tokens, the first at `position`.
  void block(const int64_t* times, int64_t rows, int64_t position) {
    for (int64_t r = 0; r < rows; ++r) {
      s.codes[r] = head.given_code(times[r]);
      call.v.load(head.row, head.kv_head, times[r], 1.0f, s.block_values.get() + r * call.value_dim);
      if (call.uses_exact_keys) {
        call.k.load(head.row, head.kv_head, times[r], 1.0f, s.keys.get() + r * call.head_dim);
      }
    }
    AttentionBlock block = s.new_block(call.has_far_q);
    block.rows = rows;
    block.head_dim = call.head_dim;
    block.far_head_dim = call.far_head_dim;
    block.far_columns = s.far_columns;
    block.near_columns = gather_near(rows, position);
    block.activation = call.activation;
    block.codebook = s.codebook.data.get();
    block.far_offsets = s.offsets.get();
    block.far_counts = s.counts.get();
    block.far_values = s.sums.data.get();
    block.codewords = s.codewords.data.get();
    block.exact_keys = call.uses_exact_keys ? s.exact_keys.data.get() : nullptr;
    block.near_values = s.near_values.data.get();
    block.near_offsets = s.near_offsets.get();
    block.first_key = -head.in_ring(position);
    block.window = call.window;
    block.causal = true;
    for (int64_t g = 0; g < call.group; ++g) {
      const int64_t query_head = head.kv_head * call.group + g;
      for (int64_t r = 0; r < rows; ++r) {
        const float score_factor = call.score_factor(position + r);
        call.q.load(head.row, query_head, times[r], score_factor, s.queries.get() + r * call.head_dim);
        if (call.has_far_q) {
          call.far_q.load(head.row, query_head, times[r], score_factor, s.far_queries.get() + r * call.far_head_dim);
        }
      }
      block.bias = s.bias.empty() ? nullptr : s.bias.data() + g * (2 * call.window - 1);
      call.block_kernel.forward(block);
      for (int64_t r = 0; r < rows; ++r) {
        const float factor = call.activation == Activation::kSoftmax ? 1.0f / s.weight_sum[r] : 1.0f;
        call.out.store(call.output_row(head.row, query_head, times[r]), s.out.get() + r * s.value_columns, factor);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      head.push(
          position + r, s.codes[r], s.keys.get() + r * call.head_dim, s.block_values.get() + r * call.value_dim,
          [this](int64_t code, const float* value) {
            head.add_far(code, value);
            s.sums.add_to_row(code, value, call.value_dim);
            s.counts[code] = static_cast<float>(head.counts[code]);
            s.offsets[code] = 0.0f;
          });
    }
  }

  // Packs the keys of the ring, oldest first, then the keys of the block. Returns the padded number of all these keys.
  int64_t gather_near(int64_t rows, int64_t position) {
    const int64_t ring = head.in_ring(position), count = ring + rows,
                  columns = round_up(count, call.block_kernel.lanes);
    s.codewords.resize(call.far_head_dim, columns);
    s.exact_keys.resize(s.exact_keys.depth, columns);
    s.near_values.resize(columns, s.value_columns);
    for (Panels* panels : {&s.codewords, &s.exact_keys, &s.near_values}) {
      panels->clear();
    }
    for (int64_t c = 0; c < columns; ++c) {
      s.near_offsets[c] = c < count ? 0.0f : -kInfinity;
    }
    for (int64_t c = 0; c < count; ++c) {
      const bool from_ring = c < ring;
      const int64_t i = from_ring ? head.slot(position, ring - c) : c - ring;
      s.codewords.set_column(c, head.codeword(from_ring ? head.ring_codes[i] : s.codes[i]));
      if (call.uses_exact_keys) {
        s.exact_keys.set_column(c, (from_ring ? head.ring_keys : s.keys.get()) + i * call.head_dim);
      }
      s.near_values.set_row(
          c, (from_ring ? head.ring_values : s.block_values.get()) + i * call.value_dim, call.value_dim);
    }
    return columns;
  }
};

}  // namespace longvq
