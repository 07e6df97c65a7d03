// What the host code of the attention and its kernels, compiled once per instruction set, agree on. A unit of work is
// one block of queries of one head against the keys that it sees one by one (near) and the codes of all others (far).
//
// "Columns" of a block's scores are the codes followed by the near keys, each of the two padded to whole registers.
// Panels: a matrix (depth, columns) as [panel][depth][panel width], so that one pass over the depth computes a panel.
#pragma once

#include <cstdint>

#include "../../attention_options.h"

namespace longvq {

constexpr int64_t kBlock = 72;  // queries of a block at most, a multiple of the rows of every kernel

// Queries and all that decides their scores.
struct AttentionScores {
  int64_t rows;          // queries
  int64_t near_depth;    // D, of pairs with exact keys
  int64_t far_depth;     // F, of pairs with codewords
  int64_t far_columns;   // padded codes
  int64_t near_columns;  // padded near keys
  Activation activation;

  const float* queries;       // (rows, D), times the scale
  const float* far_queries;   // (rows, F), times the scale: `queries` itself if there are no others
  const float* codebook;      // panels (F, far_columns)
  const float* far_offsets;   // (far_columns,) 0, or -infinity for codes without a far key
  const float* far_counts;    // (far_columns,) number of far keys
  const float* codewords;     // panels (F, near_columns) of the near keys
  const float* exact_keys;    // panels (D, near_columns); nullptr: the codewords serve inside the window as well
  const float* near_offsets;  // (near_columns,) 0, or -infinity for masked keys and padding

  // Near key c stands at position c + first_key - first_query relative to query 0 of the block.
  int64_t first_key;  // relative to the first query
  int64_t window;     // W
  bool causal;
  const float* bias;  // (2 W - 1,) by key - query + W - 1, causal ones filled up; nullptr: none
};

struct AttentionBlock : AttentionScores {
  int64_t values;            // padded E
  const float* far_values;   // panels (far_columns, values): sums of the values of the far keys
  const float* near_values;  // panels (near_columns, values)

  float* scores;  // scratch (rows, far_columns + near_columns)
  float* exact;   // scratch (rows, near_columns), with exact_keys
  float* out;     // (rows, values), not normalised
  float* total;   // (rows,) sum of the weights of all keys, under softmax
  float* top;     // (rows,) what was subtracted from the scores before exp
};

// The backward knows the normalisers, so that it takes a few columns at a time and keeps no whole row of scores.
constexpr int64_t kChunk = 128;                // columns taken at a time, a multiple of every panel
constexpr int64_t kChunkStride = kChunk + 16;  // of the scratch: rows don't fall into the same sets of the cache

struct AttentionGradientBlock : AttentionScores {
  int64_t values;                                 // E
  int64_t value_columns;                          // padded E
  int64_t near_depth_columns, far_depth_columns;  // padded D and F
  bool cluster;  // whether keys learn from outside the window: else d_codes and d_outside stay

  const float *top, *total;       // (rows,) weights of softmax are exp(score - top) / total
  const float* out;               // (rows, value_columns) the outputs
  const float* grad;              // (rows, value_columns) of the outputs
  const float* grad_panels;       // panels (rows, value_columns), the same
  const float* query_panels;      // panels (rows, near_depth_columns)
  const float* far_query_panels;  // panels (rows, far_depth_columns): `query_panels` itself if there are no others
  const float* codebook_rows;     // panels (far_columns, far_depth_columns)
  const float* far_values;        // panels (E, far_columns): sums of the values of the far keys
  const float* near_values;       // panels (E, near_columns)
  const float* codeword_rows;     // panels (near_columns, far_depth_columns)
  const float* exact_rows;        // panels (near_columns, near_depth_columns) of exact_keys

  float *scores, *slopes, *inside;  // scratch (rows, kChunkStride)
  float* delta;                     // scratch (rows,)

  // All of these grow by what the block adds. Gradients by scores are with respect to the scaled queries.
  float* d_queries;      // (rows, near_depth_columns)
  float* d_far_queries;  // (rows, far_depth_columns): `d_queries` itself if there are no others
  float* d_far_values;   // (far_columns, value_columns) of the sums of values
  float* d_codes;        // (far_columns, far_depth_columns) of the codewords as far keys
  float* d_near_values;  // (near_columns, value_columns)
  float* d_inside;       // (near_columns, near_depth_columns) of the near keys, from queries whose window they are in
  float* d_outside;      // (near_columns, far_depth_columns) from the other queries
  double* d_bias;        // (2 W - 1,), with bias
};

struct AttentionKernel {
  int64_t lanes;  // columns are padded to multiples of this
  int64_t panel;  // width of a panel, a multiple of lanes; the last one may be narrower
  void (*forward)(const AttentionBlock&);
  void (*backward)(const AttentionGradientBlock&);
  // Panels (depth, columns), columns a multiple of lanes, of a matrix whose columns are given one by one.
  void (*pack_columns)(const float* const* columns_of, int64_t columns, int64_t depth, float* panels);
};

extern const AttentionKernel attention_kernel_default;
extern const AttentionKernel attention_kernel_avx2;
extern const AttentionKernel attention_kernel_avx512;

}  // namespace longvq
