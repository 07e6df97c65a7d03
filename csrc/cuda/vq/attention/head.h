// The head and the sequence that a block of threads works on, and the rows of the tensors that belong to them.
#pragma once

#include "../../../vq/laplace.h"
#include "../../common/tile.h"
#include "../far_index.h"
#include "column_tiles.h"

namespace longvq::cuda {
namespace {

// Whether rows begin at multiples of 16 bytes; `grad` is the gradient of the output.
struct Alignment {
  bool q, far_q, k, v, grad;
};

inline Alignment alignment_of(const Attention& p) {
  return {
      rows_aligned(p.q, p.type, p.q_strides), rows_aligned(p.far_q, p.type, p.far_q_strides),
      rows_aligned(p.k, p.type, p.k_strides), rows_aligned(p.v, p.type, p.v_strides), false};
}

// One head of one sequence. Queries and keys are counted from the start of the sequence. All numbers stay in registers
// during the products, so they are 32-bit.
struct Head {
  const Attention& p;
  int batch, head, kv_head;
  int start, length, first_far_field;  // of the sequence, in its row of the tensors

  LONGVQ_DEVICE explicit Head(const Attention& problem) : p(problem) {}

  LONGVQ_DEVICE void enter(const Sequence& sequence) {
    batch = static_cast<int>(sequence.batch);
    start = static_cast<int>(sequence.start), length = static_cast<int>(sequence.length);
    first_far_field = static_cast<int>(cuda::first_far_field(p, sequence, p.options.causal, p.all_far()));
  }

  // The index of a query in arrays (B, H, L), and of a key in arrays (B, Hkv, L).
  LONGVQ_DEVICE int64_t index_of_query(int64_t query) const {
    return (batch * p.heads + head) * p.length + start + query;
  }
  LONGVQ_DEVICE int64_t index_of_key(int64_t key) const {
    return (batch * p.kv_heads + kv_head) * p.length + start + key;
  }

  // The values of codes on the device are not checked before the launch, so a wrong code must not become an address.
  LONGVQ_DEVICE int64_t code_of(int64_t key) const {
    const int64_t code = p.codes[index_of_key(key)];
    return min(max(code, int64_t{0}), p.codebook.num_codes - 1);
  }
  LONGVQ_DEVICE bool ignored(int64_t key) const { return p.mask.ignores(batch, start + key); }
  // The index of a query's far field among all far fields.
  LONGVQ_DEVICE int64_t far_field(int64_t query) const {
    const int64_t field = p.all_far() ? 0 : query / kFarBlock;
    return (batch * p.kv_heads + kv_head) * p.num_far_fields + first_far_field + field;
  }
  // The counts of all codes in the far field of a query.
  LONGVQ_DEVICE const float* counts(int64_t query) const {
    return p.counts + far_field(query) * padded_codes(p.codebook.num_codes);
  }
  LONGVQ_DEVICE float scale_of(int64_t query) const {
    return p.laplace() ? p.inverse_num_keys[batch * p.length + start + query] : p.options.scale;
  }
  // Whether a pair is inside the window; offset = key − query.
  LONGVQ_DEVICE bool inside(int offset) const {
    const int window = static_cast<int>(p.options.window);
    return offset < window && -offset < window && (!p.options.causal || offset <= 0);
  }
  // The bias column of a pair inside the window.
  LONGVQ_DEVICE int bias_entry(int offset) const {
    return p.options.causal ? -offset : offset + static_cast<int>(p.options.window) - 1;
  }
  // Adds the bias to the score of a pair. −infinity if the pair is not allowed, or not of this kind.
  LONGVQ_DEVICE float score_of_key(ColumnRange::Kind kind, int offset, float score) const {
    const bool in = inside(offset);
    if ((p.options.causal && offset > 0) || (in ? kind == ColumnRange::kOutside : kind == ColumnRange::kInside)) {
      return -INFINITY;
    }
    if (in && p.bias != nullptr) {
      score += p.bias[head * p.bias_head_stride + bias_entry(offset) * p.bias_offset_stride];
    }
    return score;
  }

  // Whether some pairs of these columns with queries first .. last need score_of_key. Codes don't, nor do keys whose
  // pairs are all of the right kind and have no bias.
  LONGVQ_DEVICE bool needs_pair_scores(const ColumnRange& columns, int first, int last) const {
    const int least = columns.first - last + 1, most = columns.last - 1 - first,
              window = static_cast<int>(p.options.window);
    const bool all_outside = most <= -window || (!p.options.causal && least >= window);
    const bool all_inside = inside(least) && inside(most) && p.bias == nullptr;
    return columns.kind != ColumnRange::kCodes && !(all_outside && columns.kind != ColumnRange::kInside) &&
           !(all_inside && columns.kind != ColumnRange::kOutside);
  }

  // Queries for pairs inside the window.
  template <typename Element>
  LONGVQ_DEVICE Rows<Element> queries(const Alignment& aligned) const {
    return rows_of<Element>(p.q, p.q_strides, head, 0, p.head_dim, aligned.q);
  }
  // Queries for pairs outside the window.
  template <typename Element>
  LONGVQ_DEVICE Rows<Element> far_queries(const Alignment& aligned) const {
    return rows_of<Element>(p.far_q, p.far_q_strides, head, 0, p.far_head_dim, aligned.far_q);
  }
  template <typename Element>
  LONGVQ_DEVICE Rows<Element> keys(const Alignment& aligned) const {
    return rows_of<Element>(p.k, p.k_strides, kv_head, 0, p.head_dim, aligned.k);
  }
  template <typename Element>
  LONGVQ_DEVICE Rows<Element> values(int64_t first, int columns, const Alignment& aligned) const {
    return rows_of<Element>(p.v, p.v_strides, kv_head, first, columns, aligned.v);
  }
  // Gradients of the outputs.
  template <typename Element>
  LONGVQ_DEVICE Rows<Element> grads(
      const AttentionGradients& g, int64_t first, int columns, const Alignment& aligned) const {
    return rows_of<Element>(g.grad, g.grad_strides, head, first, columns, aligned.grad);
  }
  // The means of the far field of a query, `columns` columns from `first`.
  template <typename Element>
  LONGVQ_DEVICE Rows<Element> means(int64_t query, int64_t first, int columns) const {
    const int64_t pitch = padded_value_dim(p.value_dim), row = far_field(query) * padded_codes(p.codebook.num_codes);
    return {static_cast<const Element*>(p.means) + row * pitch + first, pitch, columns, true};
  }
  template <int TERMS, int HEAD_DIM>
  LONGVQ_DEVICE const uint16_t* codewords() const {
    return p.codebook.terms + kv_head * TERMS * padded_codes(p.codebook.num_codes) * HEAD_DIM;
  }

 private:
  // The rows of this sequence in a tensor (B, heads, L, columns), `columns` columns from `first`.
  template <typename Element>
  LONGVQ_DEVICE Rows<Element> rows_of(
      const void* data, const Strides& strides, int of_head, int64_t first, int64_t columns, bool aligned) const {
    const auto* rows =
        static_cast<const Element*>(data) + batch * strides.batch + of_head * strides.head + start * strides.length;
    return {rows + first, strides.length, static_cast<int>(columns), aligned};
  }
};

// Mega's attention function and its derivative, on the device.
LONGVQ_DEVICE float laplace(float x) {
  return 0.5f * erfcf((kLaplaceMean - x) * kLaplaceInverseWidth);
}
LONGVQ_DEVICE float laplace_slope(float x) {
  const float y = (x - kLaplaceMean) * kLaplaceInverseWidth;
  return kLaplacePeak * expf(-y * y);
}

}  // namespace
}  // namespace longvq::cuda
