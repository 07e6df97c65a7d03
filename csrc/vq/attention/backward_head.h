// Backward of one head of one document, block of queries by block. For attention_gradient_parts.h.
#pragma once

#include "near_keys.h"

namespace longvq {

// What the backward is given besides the arguments of the forward, and where its results go (contiguous).
struct GradientTensors {
  const Tensor &grad, &out, &normalizers;
  void *dq, *dk, *dv, *dfar_q, *dfar_k;
};

// (rows, columns) of a result, added up as floats: in place, or in a buffer if the result is of a half type.
struct GradientRows {
  char* result;
  ElementType type;
  int64_t count, columns;
  AlignedArray<float> buffer;
  float* data;

  GradientRows(void* tensor, ElementType type, int64_t place, int64_t rows, int64_t columns)
      : result(static_cast<char*>(element_at(tensor, type, place * columns))), type(type), count(rows),
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

// Gradients that some blocks have collected for the codes of a head and for its biases.
struct CodeGradients {
  AlignedArray<float> values, codewords;  // (far_columns, value_columns) by the sums of values, (.., far_depth_columns)
  std::vector<std::vector<double>> bias;  // of each query head of the group

  CodeGradients(const Problem& p, bool with_values, bool with_codewords)
      : values(zeros(with_values ? p.far_columns * p.value_columns : 0)),
        codewords(zeros(with_codewords ? p.far_columns * p.far_depth_columns : 0)),
        bias(p.group, std::vector<double>(p.bias.has_value() && p.window > 0 ? 2 * p.window - 1 : 0, 0.0)) {}

  static AlignedArray<float> zeros(int64_t count) {
    AlignedArray<float> array = aligned_array<float>(count);
    std::fill_n(array.get(), count, 0.0f);
    return array;
  }
};

// Per thread: one block and all that it needs.
struct GradientScratch {
  AlignedArray<float> queries, far_queries, out, grad, top, total, delta, scores, slopes, inside;
  AlignedArray<float> d_queries, d_far_queries;
  AlignedArray<float> d_near_values, d_inside, d_outside;
  Panels query_panels, far_query_panels, grad_panels;
  NearKeys near;
  FarField far;
  Panels far_values;  // its sums as columns
  std::vector<AlignedArray<float>> block_values;
  std::vector<float> buffer;

  explicit GradientScratch(const Problem& p) : GradientScratch(p, p.near_columns(kBlock)) {}

  GradientScratch(const Problem& p, int64_t most)
      : queries(aligned_array<float>(kBlock * p.near_depth)),
        far_queries(aligned_array<float>(p.has_far_q ? kBlock * p.far_depth : 0)),
        out(aligned_array<float>(kBlock * p.value_columns)), grad(aligned_array<float>(kBlock * p.value_columns)),
        top(aligned_array<float>(kBlock)), total(aligned_array<float>(kBlock)), delta(aligned_array<float>(kBlock)),
        scores(aligned_array<float>(kBlock * kChunkStride)), slopes(aligned_array<float>(kBlock * kChunkStride)),
        inside(aligned_array<float>(kBlock * kChunkStride)),
        d_queries(aligned_array<float>(kBlock * p.near_depth_columns)),
        d_far_queries(aligned_array<float>(p.has_far_q ? kBlock * p.far_depth_columns : 0)),
        d_near_values(aligned_array<float>(most * p.value_columns)),
        d_inside(aligned_array<float>(most * p.near_depth_columns)),
        d_outside(aligned_array<float>(most * p.far_depth_columns)),
        query_panels(kBlock, p.near_depth_columns, p.kernel.panel),
        far_query_panels(p.has_far_q ? kBlock : 0, p.far_depth_columns, p.kernel.panel),
        grad_panels(kBlock, p.value_columns, p.kernel.panel), near(p, most, true), far(p, Sums::kRows),
        far_values(p.values, p.far_columns, p.kernel.panel), buffer(std::max({p.near_depth, p.far_depth, p.values})) {}

  // Zeros for the gradients of the sums of far values of one block of a part, its `number`th.
  float* clear_block(const Problem& p, int64_t number) {
    const int64_t size = p.far_columns * p.value_columns;
    if (number == static_cast<int64_t>(block_values.size())) {
      block_values.push_back(aligned_array<float>(size));
    }
    std::fill_n(block_values[number].get(), size, 0.0f);
    return block_values[number].get();
  }

  void clear_near(const Problem& p) {
    std::fill_n(d_near_values.get(), near.columns * p.value_columns, 0.0f);
    std::fill_n(d_inside.get(), near.columns * p.near_depth_columns, 0.0f);
    std::fill_n(d_outside.get(), near.columns * p.far_depth_columns, 0.0f);
  }
};

struct GradientHead {
  const Problem& p;
  const GradientTensors& tensors;
  Document document;
  int64_t length, kv_head;
  Keys keys;
  const Panels &codebook, &codebook_rows;
  std::vector<std::vector<float>> bias;  // of each query head of the group
  std::vector<float> units;
  FarFields fields;

  GradientHead(
      const Problem& p, const Codebooks& codebooks, const GradientTensors& tensors, const Document& document,
      int64_t kv_head)
      : p(p), tensors(tensors), document(document), length(document.length), kv_head(kv_head),
        keys(p, document, kv_head), codebook(codebooks.columns[kv_head]), codebook_rows(codebooks.rows[kv_head]),
        units(units_of(p, document, keys)), fields(p, keys, document.length, Sums::kRows) {
    for (int64_t g = 0; g < p.group; ++g) {
      bias.push_back(bias_of(p, kv_head * p.group + g));
    }
  }

  GradientRows rows_of(void* tensor, int64_t head, int64_t of_heads, int64_t columns) const {
    return GradientRows(tensor, p.type, p.place(document, head, of_heads), length, columns);
  }

  GradientHead(const GradientHead&) = delete;  // the far fields refer to the keys

  // One block. Gradients of its queries are stored, those of near keys are left in the scratch, and those of the sums
  // of far values are added to `d_far_values`.
  void attend(int64_t number, float* d_far_values, CodeGradients& codes, GradientScratch& scratch) const {
    const int64_t first = number * kBlock, last = std::min(first + kBlock, length);
    const FarField& far = fields.of_block(number, scratch.far);
    AttentionGradientBlock block{};
    scratch.near.gather(p, keys, first, last, length);
    pack_sums(far, scratch.far_values);
    scratch.clear_near(p);
    see(block, p, codebook, far, scratch.near, first);
    block.rows = last - first;
    block.queries = scratch.queries.get();
    block.far_queries = p.has_far_q ? scratch.far_queries.get() : block.queries;
    block.values = p.values;
    block.value_columns = p.value_columns;
    block.near_depth_columns = p.near_depth_columns;
    block.far_depth_columns = p.far_depth_columns;
    block.cluster = p.cluster;
    block.top = scratch.top.get();
    block.total = scratch.total.get();
    block.delta = scratch.delta.get();
    block.out = scratch.out.get();
    block.grad = scratch.grad.get();
    block.grad_panels = scratch.grad_panels.data.get();
    block.query_panels = scratch.query_panels.data.get();
    block.far_query_panels = p.has_far_q ? scratch.far_query_panels.data.get() : block.query_panels;
    block.codebook_rows = codebook_rows.data.get();
    block.far_values = scratch.far_values.data.get();
    block.near_values = scratch.near.values.data.get();
    block.codeword_rows = scratch.near.codeword_rows.data.get();
    block.exact_rows = scratch.near.exact_rows.data.get();
    block.scores = scratch.scores.get();
    block.slopes = scratch.slopes.get();
    block.inside = scratch.inside.get();
    block.d_queries = scratch.d_queries.get();
    block.d_far_queries = p.has_far_q ? scratch.d_far_queries.get() : block.d_queries;
    block.d_far_values = d_far_values;
    block.d_codes = codes.codewords.get();
    block.d_near_values = scratch.d_near_values.get();
    block.d_inside = scratch.d_inside.get();
    block.d_outside = scratch.d_outside.get();
    for (int64_t g = 0; g < p.group; ++g) {
      load_queries(g, first, last, scratch);
      block.bias = bias[g].empty() ? nullptr : bias[g].data();
      block.d_bias = codes.bias[g].data();
      std::fill_n(block.d_queries, block.rows * p.near_depth_columns, 0.0f);
      if (p.has_far_q) {
        std::fill_n(block.d_far_queries, block.rows * p.far_depth_columns, 0.0f);
      }
      p.kernel.backward(block);
      for (int64_t i = first; i < last; ++i) {
        store_query(tensors.dq, g, i, p.near_depth, block.d_queries + (i - first) * p.near_depth_columns);
        if (p.has_far_q) {
          store_query(tensors.dfar_q, g, i, p.far_depth, block.d_far_queries + (i - first) * p.far_depth_columns);
        }
      }
    }
  }

  void pack_sums(const FarField& far, Panels& packed) const {
    std::vector<const float*> rows(far.keys > 0 ? p.far_columns : 0);
    for (std::size_t code = 0; code < rows.size(); ++code) {
      rows[code] = far.sums.data.get() + code * p.value_columns;
    }
    p.kernel.pack_columns(rows.data(), rows.size(), p.values, packed.data.get());
  }

  void store_query(void* result, int64_t g, int64_t i, int64_t depth, float* gradient) const {
    for (int64_t d = 0; d < depth; ++d) {
      gradient[d] *= unit(i);
    }
    const int64_t place = p.place(document, kv_head * p.group + g, p.heads) + i;
    store_row(gradient, depth, element_at(result, p.type, place * depth), p.type, 1);
  }

  float unit(int64_t i) const { return units.empty() ? p.scale : units[i]; }

  // Query i of q or far_q, times the factor of its scores: as row r of a block and of its panels. `ignored`: zeros.
  void load_query(
      const Matrix& queries, int64_t i, int64_t r, bool ignored, float* buffer, float* rows, Panels& panels) const {
    float* scaled = rows + r * queries.columns;
    if (ignored) {
      std::fill_n(scaled, queries.columns, 0.0f);
      return;
    }
    const float* query = queries.row(i, buffer);
    for (int64_t d = 0; d < queries.columns; ++d) {
      scaled[d] = unit(i) * query[d];
    }
    panels.set_row(r, scaled, queries.columns);
  }

  void load_queries(int64_t g, int64_t first, int64_t last, GradientScratch& scratch) const {
    const int64_t head = kv_head * p.group + g;
    const Matrix q = p.matrix_of(p.q, document, head), far_q = p.matrix_of(p.far_q, document, head);
    const Matrix grad = p.matrix_of(tensors.grad, document, head), out = p.matrix_of(tensors.out, document, head);
    const Tensor& of = tensors.normalizers;
    const float* normalizers = static_cast<const float*>(of.const_data_ptr()) + document.row * of.stride(0) +
                               head * of.stride(1) + document.start * of.stride(2);
    scratch.query_panels.resize(last - first, p.near_depth_columns);
    scratch.far_query_panels.resize(p.has_far_q ? last - first : 0, p.far_depth_columns);
    scratch.grad_panels.resize(last - first, p.value_columns);
    scratch.query_panels.clear();
    scratch.far_query_panels.clear();
    scratch.grad_panels.clear();
    std::fill_n(scratch.out.get(), (last - first) * p.value_columns, 0.0f);
    std::fill_n(scratch.grad.get(), (last - first) * p.value_columns, 0.0f);
    for (int64_t i = first; i < last; ++i) {
      const int64_t r = i - first;
      const bool ignored = keys.ignored(i);  // its output is 0 whatever the query
      load_query(q, i, r, ignored, scratch.buffer.data(), scratch.queries.get(), scratch.query_panels);
      if (p.has_far_q) {
        load_query(far_q, i, r, ignored, scratch.buffer.data(), scratch.far_queries.get(), scratch.far_query_panels);
      }
      if (ignored) {
        scratch.top[r] = 0.0f;
        scratch.total[r] = 1.0f;
        continue;
      }
      scratch.top[r] = normalizers[i * of.stride(2)];
      scratch.total[r] = normalizers[i * of.stride(2) + of.stride(3)];
      std::copy_n(out.row(i, scratch.buffer.data()), p.values, scratch.out.get() + r * p.value_columns);
      const float* d_out = grad.row(i, scratch.buffer.data());
      std::copy_n(d_out, p.values, scratch.grad.get() + r * p.value_columns);
      scratch.grad_panels.set_row(r, d_out, p.values);
    }
  }
};

}  // namespace longvq
