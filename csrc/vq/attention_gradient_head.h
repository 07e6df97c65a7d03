// Backward of one head of one document, block of queries by block. For attention_backward_cpu.cpp.
#pragma once

#include <memory>

#include "attention_keys.h"

namespace longvq {

constexpr int64_t kGradientBlock = 72;  // queries of a block, a multiple of the rows of every kernel

// What the backward is given besides the arguments of the forward, and where its results go (contiguous).
struct GradientTensors {
  const Tensor &grad, &out, &lse;
  void *dq, *dk, *dv;
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

  void add(int64_t row, const float* values, float factor = 1.0f) {
    float* out = data + row * columns;
    for (int64_t i = 0; i < columns; ++i) {
      out[i] += factor * values[i];
    }
  }

  void finish() const {
    if (type != ElementType::kFloat) {
      store_row(data, count * columns, result, type, 1);
    }
  }
};

// Gradients that a part of the blocks has collected for the codes of a head.
struct CodeGradients {
  AlignedArray<float> values, codewords;  // (far_columns, value_columns) by the sums of values, (.., depth_columns)

  explicit CodeGradients(const Problem& p)
      : values(aligned_array<float>(p.far_columns * p.value_columns)),
        codewords(aligned_array<float>(p.cluster ? p.far_columns * p.depth_columns : 0)) {
    clear_values(p);
    clear_codewords(p);
  }

  void clear_values(const Problem& p) { std::fill_n(values.get(), p.far_columns * p.value_columns, 0.0f); }
  void clear_codewords(const Problem& p) {
    std::fill_n(codewords.get(), p.cluster ? p.far_columns * p.depth_columns : 0, 0.0f);
  }

  void add(const Problem& p, const CodeGradients& other) {
    for (int64_t i = 0; i < p.far_columns * p.value_columns; ++i) {
      values[i] += other.values[i];
    }
    for (int64_t i = 0; p.cluster && i < p.far_columns * p.depth_columns; ++i) {
      codewords[i] += other.codewords[i];
    }
  }
};

// Per thread: one block and all that it needs.
struct GradientScratch {
  AlignedArray<float> queries, out, grad, lse, delta, scores, slopes, inside, d_queries;
  AlignedArray<float> d_near_values, d_inside, d_outside;
  Panels query_panels, grad_panels;
  NearKeys near;
  std::vector<float> buffer;

  explicit GradientScratch(const Problem& p) : GradientScratch(p, p.near_columns(kGradientBlock)) {}

  GradientScratch(const Problem& p, int64_t most)
      : queries(aligned_array<float>(kGradientBlock * p.depth)),
        out(aligned_array<float>(kGradientBlock * p.value_columns)),
        grad(aligned_array<float>(kGradientBlock * p.value_columns)), lse(aligned_array<float>(kGradientBlock)),
        delta(aligned_array<float>(kGradientBlock)), scores(aligned_array<float>(kGradientBlock * kChunkStride)),
        slopes(aligned_array<float>(kGradientBlock * kChunkStride)),
        inside(aligned_array<float>(kGradientBlock * kChunkStride)),
        d_queries(aligned_array<float>(kGradientBlock * p.depth_columns)),
        d_near_values(aligned_array<float>(most * p.value_columns)),
        d_inside(aligned_array<float>(most * p.depth_columns)), d_outside(aligned_array<float>(most * p.depth_columns)),
        query_panels(kGradientBlock, p.depth_columns, p.kernel.panel),
        grad_panels(kGradientBlock, p.value_columns, p.kernel.panel), near(p, most, true),
        buffer(std::max(p.depth, p.values)) {}

  void clear_near(const Problem& p) {
    std::fill_n(d_near_values.get(), near.columns * p.value_columns, 0.0f);
    std::fill_n(d_inside.get(), near.columns * p.depth_columns, 0.0f);
    std::fill_n(d_outside.get(), near.columns * p.depth_columns, 0.0f);
  }
};

// The far keys on one side of the blocks. Step by step they grow: before block 0, 1, .. or behind the last, the last but
// one, ...
struct Side {
  bool behind;
  int64_t length, reach, steps;

  Side(const Problem& p, int64_t length, bool behind)
      : behind(behind), length(length), reach(p.reach), steps((length + kGradientBlock - 1) / kGradientBlock) {}

  int64_t block(int64_t step) const { return behind ? steps - 1 - step : step; }

  // Where the far keys of a step end (or, behind, begin).
  int64_t edge(int64_t step) const {
    const int64_t first = block(step) * kGradientBlock;
    return behind ? std::min(length, std::min(first + kGradientBlock, length) + reach)
                  : std::max<int64_t>(0, first - reach);
  }

  // use(first, last) of the keys that are far at step `later` and were not at step `earlier`; -1: at no step.
  template <typename Use>
  void keys_between(int64_t earlier, int64_t later, const Use& use) const {
    const int64_t start = earlier < 0 ? (behind ? length : 0) : edge(earlier), end = edge(later);
    use(std::min(start, end), std::max(start, end));
  }
};

struct GradientHead {
  const Problem& p;
  const GradientTensors& tensors;
  Document document;
  int64_t length, kv_head;
  Keys keys;
  Panels codebook, codebook_rows;
  std::vector<std::vector<float>> bias;     // of each query head of the group
  std::vector<std::vector<double>> d_bias;  // the gradients of these
  std::vector<float> units;

  GradientHead(const Problem& p, const GradientTensors& tensors, const Document& document, int64_t kv_head)
      : p(p), tensors(tensors), document(document), length(document.length), kv_head(kv_head),
        keys(p, document, kv_head), codebook(pack_codebook(p, keys, false)), codebook_rows(pack_codebook(p, keys, true)),
        units(units_of(p, document, keys)) {
    for (int64_t g = 0; g < p.group; ++g) {
      bias.push_back(bias_of(p, kv_head * p.group + g));
      d_bias.emplace_back(bias.back().size(), 0.0);
    }
  }

  GradientRows rows_of(void* tensor, int64_t head, int64_t of_heads, int64_t columns) const {
    return GradientRows(tensor, p.type, p.place(document, head, of_heads), length, columns);
  }

  // One block; d_query(g, query, gradient by the scaled query) is called for each of its queries.
  template <typename DQuery>
  void attend(int64_t first, int64_t last, const FarField& far, int64_t near_first, int64_t near_last,
              CodeGradients& codes, GradientScratch& scratch, const DQuery& d_query) {
    AttentionGradientBlock block{};
    scratch.near.gather(p, keys, near_first, near_last);
    scratch.clear_near(p);
    see(block, p, codebook, far, scratch.near, near_first - first);
    block.rows = last - first;
    block.queries = scratch.queries.get();
    block.values = p.values;
    block.value_columns = p.value_columns;
    block.depth_columns = p.depth_columns;
    block.cluster = p.cluster;
    block.lse = scratch.lse.get();
    block.delta = scratch.delta.get();
    block.out = scratch.out.get();
    block.grad = scratch.grad.get();
    block.grad_panels = scratch.grad_panels.data.get();
    block.query_panels = scratch.query_panels.data.get();
    block.codebook_rows = codebook_rows.data.get();
    block.far_values = far.sums.data.get();
    block.near_values = scratch.near.values.data.get();
    block.codeword_rows = scratch.near.codeword_rows.data.get();
    block.exact_rows = scratch.near.exact_rows.data.get();
    block.scores = scratch.scores.get();
    block.slopes = scratch.slopes.get();
    block.inside = scratch.inside.get();
    block.d_queries = scratch.d_queries.get();
    block.d_far_values = codes.values.get();
    block.d_codes = codes.codewords.get();
    block.d_near_values = scratch.d_near_values.get();
    block.d_inside = scratch.d_inside.get();
    block.d_outside = scratch.d_outside.get();
    for (int64_t g = 0; g < p.group; ++g) {
      load_queries(g, first, last, scratch);
      block.bias = bias[g].empty() ? nullptr : bias[g].data();
      block.d_bias = d_bias[g].data();
      std::fill_n(scratch.d_queries.get(), block.rows * p.depth_columns, 0.0f);
      p.kernel.backward(block);
      for (int64_t i = first; i < last; ++i) {
        d_query(g, i, scratch.d_queries.get() + (i - first) * p.depth_columns);
      }
    }
  }

  float unit(int64_t i) const { return units.empty() ? p.scale : units[i]; }

  void load_queries(int64_t g, int64_t first, int64_t last, GradientScratch& scratch) const {
    const int64_t head = kv_head * p.group + g;
    const Matrix q = p.matrix_of(p.q, document, head), grad = p.matrix_of(tensors.grad, document, head);
    const Matrix out = p.matrix_of(tensors.out, document, head);
    const Tensor& lse = tensors.lse;
    const float* lse_row = static_cast<const float*>(lse.const_data_ptr()) + document.row * lse.stride(0) +
                           head * lse.stride(1) + document.start * lse.stride(2);
    scratch.query_panels.resize(last - first, p.depth_columns);
    scratch.grad_panels.resize(last - first, p.value_columns);
    scratch.query_panels.clear();
    scratch.grad_panels.clear();
    std::fill_n(scratch.out.get(), (last - first) * p.value_columns, 0.0f);
    std::fill_n(scratch.grad.get(), (last - first) * p.value_columns, 0.0f);
    for (int64_t i = first; i < last; ++i) {
      const int64_t r = i - first;
      const float* query = q.row(i, scratch.buffer.data());
      float* scaled = scratch.queries.get() + r * p.depth;
      for (int64_t d = 0; d < p.depth; ++d) {
        scaled[d] = unit(i) * query[d];
      }
      scratch.query_panels.set_row(r, scaled, p.depth);
      scratch.lse[r] = lse_row[i * lse.stride(2)];
      if (keys.ignored(i)) {  // its output is 0 whatever the inputs
        continue;
      }
      std::copy_n(out.row(i, scratch.buffer.data()), p.values, scratch.out.get() + r * p.value_columns);
      const float* d_out = grad.row(i, scratch.buffer.data());
      std::copy_n(d_out, p.values, scratch.grad.get() + r * p.value_columns);
      scratch.grad_panels.set_row(r, d_out, p.values);
    }
  }

  // What the blocks have found for keys first .. last while these were far.
  void take_far_values(int64_t first, int64_t last, const CodeGradients& codes, GradientRows& dv) const {
    for (int64_t j = first; j < last; ++j) {
      if (!keys.ignored(j)) {
        dv.add(j, codes.values.get() + keys.code(j) * p.value_columns);
      }
    }
  }

  // The keys of a code share its gradient.
  void take_codewords(const CodeGradients& codes, GradientRows& dk) const {
    std::vector<float> share(p.num_codes, 0.0f);
    for (int64_t j = 0; j < length; ++j) {
      share[keys.code(j)] += keys.ignored(j) ? 0.0f : 1.0f;
    }
    for (int64_t j = 0; j < length; ++j) {
      const int64_t code = keys.code(j);
      if (!keys.ignored(j)) {
        dk.add(j, codes.codewords.get() + code * p.depth_columns, 1.0f / share[code]);
      }
    }
  }

  void take_near(int64_t first, CodeGradients& codes, const GradientScratch& scratch, GradientRows& dk,
                 GradientRows& dv) const {
    for (int64_t c = 0; c < scratch.near.columns; ++c) {
      if (scratch.near.offsets[c] != 0.0f) {  // masked or padding
        continue;
      }
      dv.add(first + c, scratch.d_near_values.get() + c * p.value_columns);
      dk.add(first + c, scratch.d_inside.get() + c * p.depth_columns);
      const float* outside = scratch.d_outside.get() + c * p.depth_columns;
      float* code = codes.codewords.get() + keys.code(first + c) * p.depth_columns;
      for (int64_t d = 0; p.cluster && d < p.depth; ++d) {
        code[d] += outside[d];
      }
    }
  }

  // All of the head, with blocks that see different far keys.
  void run(GradientScratch& scratch) {
    std::vector<GradientRows> dq;
    for (int64_t g = 0; g < p.group; ++g) {
      dq.push_back(rows_of(tensors.dq, kv_head * p.group + g, p.heads, p.depth));
    }
    GradientRows dk = rows_of(tensors.dk, kv_head, p.kv_heads, p.depth);
    GradientRows dv = rows_of(tensors.dv, kv_head, p.kv_heads, p.values);
    CodeGradients codes(p);
    one_side(Side(p, length, false), true, codes, scratch, dq, dk, dv);
    if (!p.causal) {
      codes.clear_values(p);
      one_side(Side(p, length, true), false, codes, scratch, dq, dk, dv);
    }
    if (p.cluster) {
      take_codewords(codes, dk);
    }
    for (const GradientRows& rows : dq) {
      rows.finish();
    }
    dk.finish();
    dv.finish();
  }

  // From the last step to the first, so that a key has its gradient when it stops being far. The far fields grow in the
  // other direction, and are made again from a few that were kept: a sum that keys were taken out of would be inexact.
  void one_side(const Side& side, bool with_near, CodeGradients& codes, GradientScratch& scratch,
                std::vector<GradientRows>& dq, GradientRows& dk, GradientRows& dv) {
    if (length == 0) {
      return;
    }
    // About as many keys between two as there are codes: they take the memory of the values, at most.
    const int64_t spacing = std::max<int64_t>(4, (p.num_codes + kGradientBlock - 1) / kGradientBlock);
    std::vector<std::unique_ptr<FarField>> kept;
    for (int64_t step = 0; step < side.steps; step += spacing) {
      auto field = std::make_unique<FarField>(p, Sums::kColumns);
      if (step > 0) {
        field->copy(p, *kept.back());
      }
      side.keys_between(
          step > 0 ? step - spacing : -1, step, [&](int64_t a, int64_t b) { field->add(p, keys, a, b); });
      kept.push_back(std::move(field));
    }
    FarField far(p, Sums::kColumns);
    for (int64_t step = side.steps - 1; step >= 0; --step) {
      const int64_t from = step / spacing * spacing;
      far.copy(p, *kept[step / spacing]);
      side.keys_between(from, step, [&](int64_t a, int64_t b) { far.add(p, keys, a, b); });
      const int64_t first = side.block(step) * kGradientBlock, last = std::min(first + kGradientBlock, length);
      const int64_t near_first = with_near ? std::max<int64_t>(0, first - p.reach) : 0;
      const int64_t near_last = with_near ? (p.causal ? last : std::min(length, last + p.reach)) : 0;
      attend(first, last, far, near_first, near_last, codes, scratch, [&](int64_t g, int64_t i, const float* gradient) {
        dq[g].add(i, gradient, unit(i));
      });
      if (with_near) {
        take_near(near_first, codes, scratch, dk, dv);
      }
      side.keys_between(step - 1, step, [&](int64_t a, int64_t b) { take_far_values(a, b, codes, dv); });
      if (step == from) {
        kept.pop_back();
      }
    }
  }
};

}  // namespace longvq
