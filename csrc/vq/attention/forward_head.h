// The forward of one key-value head of one document, one block of queries at a time. For forward.cpp.
#pragma once

#include "block_buffers.h"
#include "near_keys.h"

namespace longvq {

// Buffers of a thread for one block of queries.
struct ForwardScratch : BlockBuffers {
  NearKeys near;
  FarField far;
  std::vector<float> buffer;

  explicit ForwardScratch(const AttentionCall& call)
      : BlockBuffers(call, call.far_columns, call.near_columns(kBlock), call.value_columns),
        near(call, call.near_columns(kBlock), false), far(call, SumLayout::kPanels),
        buffer(std::max(call.head_dim, call.far_head_dim)) {}
};

struct ForwardHead {
  const AttentionCall& call;
  void* out;           // (B, H, L, E)
  float* normalizers;  // (B, H, L, 2)
  Document document;
  int64_t length, kv_head;
  Keys keys;
  const Panels& codebook;
  std::vector<std::vector<float>> bias;  // by query head of the group
  std::vector<float> score_factors;
  FarFields fields;

  ForwardHead(
      const AttentionCall& call, const Codebooks& codebooks, void* out, float* normalizers, const Document& document,
      int64_t kv_head)
      : call(call), out(out), normalizers(normalizers), document(document), length(document.length), kv_head(kv_head),
        keys(call, document, kv_head), codebook(codebooks.columns[kv_head]),
        score_factors(score_factors_of(call, document, keys)), fields(call, keys, document.length, SumLayout::kPanels) {
    for (int64_t g = 0; g < call.group; ++g) {
      bias.push_back(bias_of(call, kv_head * call.group + g));
    }
  }

  ForwardHead(const ForwardHead&) = delete;  // `fields` has a reference to `keys`

  void attend(int64_t number, ForwardScratch& scratch) const {
    const int64_t first = number * kBlock, last = std::min(first + kBlock, length);
    const FarField& far = fields.of_block(number, scratch.far);
    AttentionBlock block = scratch.new_block(call.has_far_q);
    scratch.near.gather(call, keys, first, last, length);
    set_score_inputs(block, call, codebook, far, scratch.near, first);
    block.rows = last - first;
    block.far_values = far.sums.data.get();
    block.near_values = scratch.near.values.data.get();
    for (int64_t g = 0; g < call.group; ++g) {
      load(call.q, g, first, last, scratch.buffer.data(), scratch.queries.get());
      if (call.has_far_q) {
        load(call.far_q, g, first, last, scratch.buffer.data(), scratch.far_queries.get());
      }
      block.bias = bias[g].empty() ? nullptr : bias[g].data();
      call.kernel.forward(block);
      for (int64_t i = first; i < last; ++i) {
        const int64_t r = i - first;
        finish(g, i, scratch.out.get() + r * call.value_columns, scratch.weight_sum[r], scratch.max_score[r]);
      }
    }
  }

  // Queries first .. last of q or far_q, times the factors of their scores.
  void load(const Tensor& queries, int64_t g, int64_t first, int64_t last, float* buffer, float* out_rows) const {
    const Matrix matrix = call.matrix_of(queries, document, kv_head * call.group + g);
    for (int64_t i = first; i < last; ++i) {
      const float score_factor = score_factors.empty() ? call.scale : score_factors[i];
      const float* query = matrix.row(i, buffer);
      for (int64_t d = 0; d < matrix.columns; ++d) {
        *out_rows++ = score_factor * query[d];
      }
    }
  }

  void finish(int64_t g, int64_t i, float* sums, float weight_sum, float max_score) const {
    const int64_t row = call.first_row(document, kv_head * call.group + g, call.heads) + i;
    weight_sum = weight_sum == 0.0f ? 1.0f : weight_sum;  // a query without allowed keys, or laplace
    normalizers[2 * row] = max_score;
    normalizers[2 * row + 1] = weight_sum;
    const float factor = keys.ignored(i) ? 0.0f : 1.0f / weight_sum;
    for (int64_t e = 0; e < call.value_dim; ++e) {
      sums[e] = factor == 0.0f ? 0.0f : sums[e] * factor;
    }
    store_row(sums, call.value_dim, element_at(out, call.type, row * call.value_dim), call.type, 1);
  }
};

}  // namespace longvq
