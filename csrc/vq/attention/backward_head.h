// The backward of one key-value head of one document, one block of queries at a time. For backward_ranges.h.
#pragma once

#include "near_keys.h"

namespace longvq {

// The inputs that the backward has and the forward has not, and the results, which are contiguous.
struct BackwardTensors {
  const Tensor &grad, &out, &normalizers;
  void *dq, *dk, *dv, *dfar_q, *dfar_k;
};

// The rows (rows, columns) of a result, accumulated in float32: in place, or in a buffer for half-precision results.
struct GradientRows {
  char* result;
  ElementType type;
  int64_t count, columns;
  AlignedArray<float> buffer;
  float* data;

  GradientRows(void* tensor, ElementType type, int64_t first_row, int64_t rows, int64_t columns)
      : result(static_cast<char*>(element_at(tensor, type, first_row * columns))), type(type), count(rows),
        columns(columns), buffer(aligned_array<float>(type == ElementType::kFloat ? 0 : rows * columns)),
        data(type == ElementType::kFloat ? reinterpret_cast<float*>(result) : buffer.get()) {
    std::fill_n(data, count * columns, 0.0f);
  }

  float* row(int64_t i) { return data + i * columns; }

  void finish() const {
    if (type != ElementType::kFloat) {
      store_row(data, count * columns, result, type, 1);
    }
  }
};

inline void add_to(float* out, const float* values, int64_t count, float factor = 1.0f) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] += factor * values[i];
  }
}

// Gradients of the sums of far values, of the codewords and of the bias, summed over a range of blocks.
struct CodeGradients {
  AlignedArray<float> values;             // (far_columns, value_columns), of the sums of far values
  AlignedArray<float> codewords;          // (far_columns, far_head_columns)
  std::vector<std::vector<double>> bias;  // by query head of the group

  CodeGradients(const AttentionCall& call, bool with_values, bool with_codewords)
      : values(zeros(with_values ? call.far_columns * call.value_columns : 0)),
        codewords(zeros(with_codewords ? call.far_columns * call.far_head_columns : 0)),
        bias(call.group, std::vector<double>(call.bias.has_value() && call.window > 0 ? 2 * call.window - 1 : 0, 0.0)) {
  }

  static AlignedArray<float> zeros(int64_t count) {
    AlignedArray<float> array = aligned_array<float>(count);
    std::fill_n(array.get(), count, 0.0f);
    return array;
  }
};

// Buffers of a thread for one block of queries.
struct BackwardScratch {
  AlignedArray<float> queries, far_queries, out, grad, max_score, weight_sum, delta, scores, d_scores, d_scores_inside;
  AlignedArray<float> d_queries, d_far_queries;
  AlignedArray<float> d_near_values, d_keys_inside, d_keys_outside;
  Panels query_panels, far_query_panels, grad_panels;
  NearKeys near;
  FarField far;
  Panels far_values;  // panels (E, far_columns) of the sums of `far`
  std::vector<AlignedArray<float>> block_values;
  std::vector<float> buffer;

  explicit BackwardScratch(const AttentionCall& call) : BackwardScratch(call, call.near_columns(kBlock)) {}

  BackwardScratch(const AttentionCall& call, int64_t max_near)
      : queries(aligned_array<float>(kBlock * call.head_dim)),
        far_queries(aligned_array<float>(call.has_far_q ? kBlock * call.far_head_dim : 0)),
        out(aligned_array<float>(kBlock * call.value_columns)), grad(aligned_array<float>(kBlock * call.value_columns)),
        max_score(aligned_array<float>(kBlock)), weight_sum(aligned_array<float>(kBlock)),
        delta(aligned_array<float>(kBlock)), scores(aligned_array<float>(kBlock * kChunkStride)),
        d_scores(aligned_array<float>(kBlock * kChunkStride)),
        d_scores_inside(aligned_array<float>(kBlock * kChunkStride)),
        d_queries(aligned_array<float>(kBlock * call.head_columns)),
        d_far_queries(aligned_array<float>(call.has_far_q ? kBlock * call.far_head_columns : 0)),
        d_near_values(aligned_array<float>(max_near * call.value_columns)),
        d_keys_inside(aligned_array<float>(max_near * call.head_columns)),
        d_keys_outside(aligned_array<float>(max_near * call.far_head_columns)),
        query_panels(kBlock, call.head_columns, call.kernel.panel),
        far_query_panels(call.has_far_q ? kBlock : 0, call.far_head_columns, call.kernel.panel),
        grad_panels(kBlock, call.value_columns, call.kernel.panel), near(call, max_near, true),
        far(call, SumLayout::kRows), far_values(call.value_dim, call.far_columns, call.kernel.panel),
        buffer(std::max({call.head_dim, call.far_head_dim, call.value_dim})) {}

  // A buffer of zeros for the gradients of the far field of block `number` of a range.
  float* clear_block(const AttentionCall& call, int64_t number) {
    const int64_t size = call.far_columns * call.value_columns;
    if (number == static_cast<int64_t>(block_values.size())) {
      block_values.push_back(aligned_array<float>(size));
    }
    std::fill_n(block_values[number].get(), size, 0.0f);
    return block_values[number].get();
  }

  void clear_near(const AttentionCall& call) {
    std::fill_n(d_near_values.get(), near.columns * call.value_columns, 0.0f);
    std::fill_n(d_keys_inside.get(), near.columns * call.head_columns, 0.0f);
    std::fill_n(d_keys_outside.get(), near.columns * call.far_head_columns, 0.0f);
  }
};

struct BackwardHead {
  const AttentionCall& call;
  const BackwardTensors& tensors;
  Document document;
  int64_t length, kv_head;
  Keys keys;
  const Panels &codebook, &codebook_rows;
  std::vector<std::vector<float>> bias;  // by query head of the group
  std::vector<float> score_factors;
  FarFields fields;

  BackwardHead(
      const AttentionCall& call, const Codebooks& codebooks, const BackwardTensors& tensors, const Document& document,
      int64_t kv_head)
      : call(call), tensors(tensors), document(document), length(document.length), kv_head(kv_head),
        keys(call, document, kv_head), codebook(codebooks.columns[kv_head]), codebook_rows(codebooks.rows[kv_head]),
        score_factors(score_factors_of(call, document, keys)), fields(call, keys, document.length, SumLayout::kRows) {
    for (int64_t g = 0; g < call.group; ++g) {
      bias.push_back(bias_of(call, kv_head * call.group + g));
    }
  }

  GradientRows rows_of(void* tensor, int64_t head, int64_t num_heads, int64_t columns) const {
    return GradientRows(tensor, call.type, call.first_row(document, head, num_heads), length, columns);
  }

  BackwardHead(const BackwardHead&) = delete;  // `fields` has a reference to `keys`

  // Differentiates one block. Stores the gradients of its queries, and leaves the gradients of near keys and their
  // values in the scratch. Adds the gradients of the sums of far values to `d_far_values`, and the gradients of
  // codewords and bias to `codes`.
  void attend(int64_t number, float* d_far_values, CodeGradients& codes, BackwardScratch& scratch) const {
    const int64_t first = number * kBlock, last = std::min(first + kBlock, length);
    const FarField& far = fields.of_block(number, scratch.far);
    AttentionGradientBlock block{};
    scratch.near.gather(call, keys, first, last, length);
    pack_sums(far, scratch.far_values);
    scratch.clear_near(call);
    set_score_inputs(block, call, codebook, far, scratch.near, first);
    block.rows = last - first;
    block.queries = scratch.queries.get();
    block.far_queries = call.has_far_q ? scratch.far_queries.get() : block.queries;
    block.value_dim = call.value_dim;
    block.value_columns = call.value_columns;
    block.head_columns = call.head_columns;
    block.far_head_columns = call.far_head_columns;
    block.shares_gradients = call.shares_gradients;
    block.max_score = scratch.max_score.get();
    block.weight_sum = scratch.weight_sum.get();
    block.delta = scratch.delta.get();
    block.out = scratch.out.get();
    block.grad = scratch.grad.get();
    block.grad_panels = scratch.grad_panels.data.get();
    block.query_panels = scratch.query_panels.data.get();
    block.far_query_panels = call.has_far_q ? scratch.far_query_panels.data.get() : block.query_panels;
    block.codebook_rows = codebook_rows.data.get();
    block.far_values = scratch.far_values.data.get();
    block.near_values = scratch.near.values.data.get();
    block.codeword_rows = scratch.near.codeword_rows.data.get();
    block.exact_rows = scratch.near.exact_rows.data.get();
    block.scores = scratch.scores.get();
    block.d_scores = scratch.d_scores.get();
    block.d_scores_inside = scratch.d_scores_inside.get();
    block.d_queries = scratch.d_queries.get();
    block.d_far_queries = call.has_far_q ? scratch.d_far_queries.get() : block.d_queries;
    block.d_far_values = d_far_values;
    block.d_codes = codes.codewords.get();
    block.d_near_values = scratch.d_near_values.get();
    block.d_keys_inside = scratch.d_keys_inside.get();
    block.d_keys_outside = scratch.d_keys_outside.get();
    for (int64_t g = 0; g < call.group; ++g) {
      load_queries(g, first, last, scratch);
      block.bias = bias[g].empty() ? nullptr : bias[g].data();
      block.d_bias = codes.bias[g].data();
      std::fill_n(block.d_queries, block.rows * call.head_columns, 0.0f);
      if (call.has_far_q) {
        std::fill_n(block.d_far_queries, block.rows * call.far_head_columns, 0.0f);
      }
      call.kernel.backward(block);
      for (int64_t i = first; i < last; ++i) {
        store_query(tensors.dq, g, i, call.head_dim, block.d_queries + (i - first) * call.head_columns);
        if (call.has_far_q) {
          store_query(
              tensors.dfar_q, g, i, call.far_head_dim, block.d_far_queries + (i - first) * call.far_head_columns);
        }
      }
    }
  }

  void pack_sums(const FarField& far, Panels& packed) const {
    std::vector<const float*> rows(far.keys > 0 ? call.far_columns : 0);
    for (std::size_t code = 0; code < rows.size(); ++code) {
      rows[code] = far.sums.data.get() + code * call.value_columns;
    }
    call.kernel.pack_columns(rows.data(), rows.size(), call.value_dim, packed.data.get());
  }

  void store_query(void* result, int64_t g, int64_t i, int64_t columns, float* gradient) const {
    for (int64_t d = 0; d < columns; ++d) {
      gradient[d] *= score_factor(i);
    }
    const int64_t row = call.first_row(document, kv_head * call.group + g, call.heads) + i;
    store_row(gradient, columns, element_at(result, call.type, row * columns), call.type, 1);
  }

  float score_factor(int64_t i) const { return score_factors.empty() ? call.scale : score_factors[i]; }

  // Query i of q or far_q, times the factor of its scores, as row r of `rows` and `panels`; zeros if it is ignored.
  void load_query(
      const Matrix& queries, int64_t i, int64_t r, bool ignored, float* buffer, float* rows, Panels& panels) const {
    float* scaled = rows + r * queries.columns;
    if (ignored) {
      std::fill_n(scaled, queries.columns, 0.0f);
      return;
    }
    const float* query = queries.row(i, buffer);
    for (int64_t d = 0; d < queries.columns; ++d) {
      scaled[d] = score_factor(i) * query[d];
    }
    panels.set_row(r, scaled, queries.columns);
  }

  void load_queries(int64_t g, int64_t first, int64_t last, BackwardScratch& scratch) const {
    const int64_t head = kv_head * call.group + g;
    const Matrix q = call.matrix_of(call.q, document, head), far_q = call.matrix_of(call.far_q, document, head);
    const Matrix grad = call.matrix_of(tensors.grad, document, head), out = call.matrix_of(tensors.out, document, head);
    const Tensor& all = tensors.normalizers;
    const float* normalizers = static_cast<const float*>(all.const_data_ptr()) + document.row * all.stride(0) +
                               head * all.stride(1) + document.start * all.stride(2);
    scratch.query_panels.resize(last - first, call.head_columns);
    scratch.far_query_panels.resize(call.has_far_q ? last - first : 0, call.far_head_columns);
    scratch.grad_panels.resize(last - first, call.value_columns);
    scratch.query_panels.clear();
    scratch.far_query_panels.clear();
    scratch.grad_panels.clear();
    std::fill_n(scratch.out.get(), (last - first) * call.value_columns, 0.0f);
    std::fill_n(scratch.grad.get(), (last - first) * call.value_columns, 0.0f);
    for (int64_t i = first; i < last; ++i) {
      const int64_t r = i - first;
      const bool ignored = keys.ignored(i);  // its output is 0
      load_query(q, i, r, ignored, scratch.buffer.data(), scratch.queries.get(), scratch.query_panels);
      if (call.has_far_q) {
        load_query(far_q, i, r, ignored, scratch.buffer.data(), scratch.far_queries.get(), scratch.far_query_panels);
      }
      if (ignored) {
        scratch.max_score[r] = 0.0f;
        scratch.weight_sum[r] = 1.0f;
        continue;
      }
      scratch.max_score[r] = normalizers[i * all.stride(2)];
      scratch.weight_sum[r] = normalizers[i * all.stride(2) + all.stride(3)];
      std::copy_n(out.row(i, scratch.buffer.data()), call.value_dim, scratch.out.get() + r * call.value_columns);
      const float* d_out = grad.row(i, scratch.buffer.data());
      std::copy_n(d_out, call.value_dim, scratch.grad.get() + r * call.value_columns);
      scratch.grad_panels.set_row(r, d_out, call.value_dim);
    }
  }
};

}  // namespace longvq
