// The interface between the host code of attention and its kernels, which are compiled once per instruction set. A unit
// of work is one block of queries of one head, with its near keys and the codes of all other keys.
//
// The columns of a block's scores are the codes, then the near keys; both numbers are padded to whole registers.
// A matrix (depth, columns) in panels is stored as [panel][depth][panel width]: one pass over the depth of a panel
// multiplies all of its columns.
#pragma once

#include <cstdint>

#include "../../attention_options.h"

namespace longvq {

constexpr int64_t kBlock = 72;  // the largest number of queries of a block, a multiple of the rows of every kernel

// The queries of a block and everything that their scores depend on.
struct AttentionScores {
  int64_t rows;          // queries
  int64_t head_dim;      // D, columns of queries and exact keys
  int64_t far_head_dim;  // F, columns of far queries and codewords
  int64_t far_columns;   // padded codes
  int64_t near_columns;  // padded near keys
  Activation activation;

  const float* queries;       // (rows, D), times the factors of their scores
  const float* far_queries;   // (rows, F), times the same; equal to `queries` without far_q
  const float* codebook;      // panels (F, far_columns)
  const float* far_offsets;   // (far_columns,) 0, or -infinity for codes without far keys
  const float* far_counts;    // (far_columns,) numbers of far keys
  const float* codewords;     // panels (F, near_columns) of the near keys
  const float* exact_keys;    // panels (D, near_columns); nullptr: codewords also inside the window
  const float* near_offsets;  // (near_columns,) 0, or -infinity for masked keys and padding

  int64_t first_key;  // position of near key 0 minus position of query 0 of the block
  int64_t window;     // W
  bool causal;
  const float* bias;  // (2 W - 1,) by key - query + W - 1, zeros in the future if causal; nullptr: no bias
};

struct AttentionBlock : AttentionScores {
  int64_t value_columns;     // padded E
  const float* far_values;   // panels (far_columns, value_columns): sums of the values of far keys
  const float* near_values;  // panels (near_columns, value_columns)

  float* scores;        // scratch (rows, far_columns + near_columns)
  float* exact_scores;  // scratch (rows, near_columns), if exact_keys is given
  float* out;           // (rows, value_columns), not normalised
  float* weight_sum;    // (rows,) softmax: sums of the weights of all keys
  float* max_score;     // (rows,) softmax: the numbers subtracted from the scores before exp
};

// The backward has the normalizers, so it processes chunks of columns and needs no whole row of scores.
constexpr int64_t kChunk = 128;                // columns of a chunk, a multiple of every panel
constexpr int64_t kChunkStride = kChunk + 16;  // of the scratch, so that rows use different sets of the cache

struct AttentionGradientBlock : AttentionScores {
  int64_t value_dim;                       // E
  int64_t value_columns;                   // padded E
  int64_t head_columns, far_head_columns;  // padded D and F
  bool shares_gradients;                   // without it d_codes and d_keys_outside are not computed

  const float *max_score, *weight_sum;  // (rows,) the weights of softmax are exp(score - max_score) / weight_sum
  const float* out;                     // (rows, value_columns) the outputs
  const float* grad;                    // (rows, value_columns) gradients of the outputs
  const float* grad_panels;             // panels (rows, value_columns) of `grad`
  const float* query_panels;            // panels (rows, head_columns)
  const float* far_query_panels;        // panels (rows, far_head_columns); equal to `query_panels` without far_q
  const float* codebook_rows;           // panels (far_columns, far_head_columns)
  const float* far_values;              // panels (E, far_columns): sums of the values of far keys
  const float* near_values;             // panels (E, near_columns)
  const float* codeword_rows;           // panels (near_columns, far_head_columns)
  const float* exact_rows;              // panels (near_columns, head_columns) of exact_keys

  // Scratch (rows, kChunkStride). `scores` holds scores, then weights P. `d_scores` holds dP, then dS, finally dS of
  // pairs outside the window only. `d_scores_inside` holds exact scores, then dS of pairs inside the window.
  float *scores, *d_scores, *d_scores_inside;
  float* delta;  // scratch (rows,): dO . O

  // The block adds its gradients to these. d_queries and d_far_queries are gradients of the scaled queries.
  float* d_queries;       // (rows, head_columns)
  float* d_far_queries;   // (rows, far_head_columns); equal to `d_queries` without far_q
  float* d_far_values;    // (far_columns, value_columns), of the sums of far values
  float* d_codes;         // (far_columns, far_head_columns), of the codewords of far keys
  float* d_near_values;   // (near_columns, value_columns)
  float* d_keys_inside;   // (near_columns, head_columns), from pairs inside the window
  float* d_keys_outside;  // (near_columns, far_head_columns), of codewords of near keys, from pairs outside the window
  double* d_bias;         // (2 W - 1,), if bias is given
};

struct AttentionKernel {
  int64_t lanes;  // columns are padded to multiples of this
  int64_t panel;  // width of a panel, a multiple of lanes; the last panel may be narrower
  void (*forward)(const AttentionBlock&);
  void (*backward)(const AttentionGradientBlock&);
  // Packs a matrix whose columns are contiguous arrays into panels (depth, columns); columns is a multiple of lanes.
  void (*pack_columns)(const float* const* column, int64_t columns, int64_t depth, float* panels);
};

extern const AttentionKernel attention_kernel_default;
extern const AttentionKernel attention_kernel_avx2;
extern const AttentionKernel attention_kernel_avx512;

}  // namespace longvq
