// The checked arguments of one call of the attention operator, and the keys of one of its heads.
#pragma once

#include <vector>

#include "../../common/documents.h"
#include "../../common/numbers.h"
#include "../attention_operator.h"
#include "../panels.h"
#include "kernel/attention_kernel.h"

namespace longvq {

struct AttentionCall {
  const Tensor &q, &k, &v, &codebook, &codes;
  const Tensor& far_q;  // queries for pairs outside the window; equal to q if far_q is absent
  const OptionalTensor &bias, &mask;
  std::vector<Document> documents;
  ElementType type;  // of q, k, v, far_q, far_k, the output and their gradients
  float scale;
  bool causal;
  int64_t window;  // min(W, L)
  Activation activation;
  bool uses_exact_keys;   // inside the window
  bool shares_gradients;  // KeyGrad::kCluster: keys get gradients from pairs outside the window
  bool has_far_q;
  int64_t batch, heads, kv_heads, group, length, num_codes;
  int64_t head_dim, far_head_dim;  // D of pairs inside the window, F of all other pairs
  int64_t value_dim;               // E
  int64_t reach;                   // max(W - 1, 0): keys further than this from a block are far from all its queries
  const AttentionKernel& kernel;
  int64_t far_columns, value_columns, head_columns, far_head_columns;  // S, E, D and F, padded to whole registers

  // Checks everything that memory safety depends on. Python checks the same first, with better messages; calls through
  // torch.ops skip Python.
  AttentionCall(const AttentionInputs& inputs, const AttentionOptions& options);

  // The number of bias columns that pairs use.
  int64_t bias_columns() const { return window == 0 ? 0 : causal ? window : 2 * window - 1; }
  // Bidirectional without a window: all blocks share one far field.
  bool everything_far() const { return window == 0 && !causal; }
  bool empty() const { return batch == 0 || heads == 0 || length == 0; }
  // Pairs of a document and a key-value head.
  int64_t pairs() const { return static_cast<int64_t>(documents.size()) * kv_heads; }

  // The largest number of near keys of a block of `rows` queries, padded.
  int64_t near_columns(int64_t rows) const {
    const int64_t near = everything_far() ? 0 : std::min(length, rows + (causal ? 1 : 2) * reach);
    return round_up(near, kernel.lanes);
  }

  // The rows of one document and head of x (B, heads, L, columns).
  Matrix matrix_of(const Tensor& x, const Document& document, int64_t head) const {
    const int64_t offset = document.row * x.stride(0) + head * x.stride(1) + document.start * x.stride(2);
    return {
        static_cast<const char*>(x.const_data_ptr()) + offset * element_size(type), x.stride(2), x.stride(3), x.size(3),
        type};
  }

  // The first row of a document and head in a contiguous tensor (B, num_heads, L, columns).
  int64_t first_row(const Document& document, int64_t head, int64_t num_heads) const {
    return (document.row * num_heads + head) * length + document.start;
  }
};

// The keys, values and codes of one document and key-value head.
struct Keys {
  Matrix k, v, codebook;
  const int64_t* codes;
  int64_t code_stride;
  const bool* masked;
  int64_t mask_stride;

  Keys(const AttentionCall& call, const Document& document, int64_t head);

  int64_t code(int64_t j) const { return codes[j * code_stride]; }
  bool ignored(int64_t j) const { return masked != nullptr && masked[j * mask_stride]; }
};

// The codebook (S, F) of a key-value head.
Matrix codebook_of(const AttentionCall& call, int64_t head);

// The biases of a query head as the kernel reads them, by key - query + W - 1; empty without a bias.
std::vector<float> bias_of(const AttentionCall& call, int64_t head);

// The column of the bias tensor for entry i < bias_columns() of bias_of().
int64_t bias_column(const AttentionCall& call, int64_t i);

// The factor of each query's scores with laplace, 1 / (number of allowed keys); empty with softmax.
std::vector<float> score_factors_of(const AttentionCall& call, const Document& document, const Keys& keys);

}  // namespace longvq
