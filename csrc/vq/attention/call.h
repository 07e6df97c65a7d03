// The arguments of one call of the attention operator, checked, and the keys of one head of it.
#pragma once

#include <limits>
#include <vector>

#include "../../common/documents.h"
#include "../attention_operator.h"
#include "../panels.h"
#include "kernel/attention_kernel.h"

namespace longvq {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Problem {
  const Tensor &q, &k, &v, &codebook, &codes;
  const Tensor& far_q;  // queries for pairs outside the window: q itself if there are no others
  const OptionalTensor &bias, &mask;
  std::vector<Document> documents;
  ElementType type;  // of q, k, v and of what is made in their likeness
  float scale;
  bool causal;
  int64_t window;  // of a window wider than the longest document no more than that is left
  Activation activation;
  bool exact, cluster, has_far_q;
  int64_t batch, heads, kv_heads, group, length, values, num_codes;
  int64_t near_depth, far_depth;  // D of pairs inside the window, F of all others
  int64_t reach;                  // keys further than this from a block are far from all of it
  const AttentionKernel& kernel;
  int64_t far_columns, value_columns, near_depth_columns, far_depth_columns;  // padded to whole registers

  // Checks that nothing reads or writes outside of the tensors; Python has checked the same with better messages.
  Problem(const AttentionInputs& inputs, const AttentionOptions& options);

  int64_t bias_columns() const { return window == 0 ? 0 : causal ? window : 2 * window - 1; }  // that have an effect
  bool everything_far() const { return window == 0 && !causal; }
  bool empty() const { return batch == 0 || heads == 0 || length == 0; }
  int64_t pairs() const { return static_cast<int64_t>(documents.size()) * kv_heads; }

  // The most near keys of any block of `rows` queries, padded.
  int64_t near_columns(int64_t rows) const {
    const int64_t near = everything_far() ? 0 : std::min(length, rows + (causal ? 1 : 2) * reach);
    return round_up(near, kernel.lanes);
  }

  Matrix matrix_of(const Tensor& x, const Document& document, int64_t head) const {
    const int64_t offset = document.row * x.stride(0) + head * x.stride(1) + document.start * x.stride(2);
    return {
        static_cast<const char*>(x.const_data_ptr()) + offset * element_size(type), x.stride(2), x.stride(3), x.size(3),
        type};
  }

  // Where the results of this document and head begin in a contiguous (B, heads, L, columns).
  int64_t place(const Document& document, int64_t head, int64_t of_heads) const {
    return (document.row * of_heads + head) * length + document.start;
  }
};

// The keys of one document and key-value head.
struct Keys {
  Matrix k, v, codebook;
  const int64_t* codes;
  int64_t code_stride;
  const bool* masked;
  int64_t mask_stride;

  Keys(const Problem& p, const Document& document, int64_t head);

  int64_t code(int64_t j) const { return codes[j * code_stride]; }
  bool ignored(int64_t j) const { return masked != nullptr && masked[j * mask_stride]; }
};

// (S, F) of a key-value head.
Matrix codebook_of(const Problem& p, int64_t head);

// What the window's biases look like to the kernel: by key - query + W - 1. Empty: none.
std::vector<float> bias_of(const Problem& p, int64_t head);

// The column of the caller's bias for entry `i` of that; the first bias_columns() have one.
int64_t bias_column(const Problem& p, int64_t i);

// One over the number of keys that each query may attend, for laplace; empty for softmax.
std::vector<float> units_of(const Problem& p, const Document& document, const Keys& keys);

}  // namespace longvq
