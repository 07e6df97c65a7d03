// What the host code in attention_cpu.cpp and the kernels in attention_kernel.cpp, compiled once per instruction set,
// agree on. A unit of work is one block of queries of one head against the keys that it sees one by one (near) and the
// codes of all others (far).
//
// "Columns" of a block's scores are the codes followed by the near keys, each of the two padded to whole registers.
// Panels: a matrix (depth, columns) as [panel][depth][panel width], so that one pass over the depth computes a panel.
#pragma once

#include <cstdint>

namespace longvq {

// What one score is turned into.
enum class AttentionWeight { kSoftmax, kLaplace };

struct AttentionBlock {
  int64_t rows;         // queries
  int64_t depth;        // D
  int64_t far_columns;  // padded codes
  int64_t near_columns; // padded near keys
  int64_t values;       // padded E
  AttentionWeight weight;

  const float* queries;        // (rows, D), times the scale
  const float* codebook;       // panels (D, far_columns)
  const float* far_offsets;    // (far_columns,) 0, or -infinity for codes without a far key
  const float* far_counts;     // (far_columns,) number of far keys
  const float* far_values;     // panels (far_columns, values): sums of the values of the far keys
  const float* codewords;      // panels (D, near_columns) of the near keys
  const float* exact_keys;     // panels (D, near_columns); nullptr: the codewords serve inside the window as well
  const float* near_values;    // panels (near_columns, values)
  const float* near_offsets;   // (near_columns,) 0, or -infinity for masked keys and padding

  // Near key c stands at position c + first_key - first_query relative to query 0 of the block.
  int64_t first_key;           // relative to the first query
  int64_t window;              // W
  bool causal;
  const float* bias;           // (2 W - 1,) by key - query + W - 1, causal ones filled up; nullptr: none

  float* scores;               // scratch (rows, far_columns + near_columns)
  float* exact;                // scratch (rows, near_columns), with exact_keys
  float* out;                  // (rows, values), not normalised
  float* total;                // (rows,) sum of the weights of all keys, under softmax
  float* top;                  // (rows,) what was subtracted from the scores before exp
};

struct AttentionKernel {
  int64_t lanes;  // columns are padded to multiples of this
  int64_t panel;  // width of a panel, a multiple of lanes; the last one may be narrower
  void (*forward)(const AttentionBlock&);
};

extern const AttentionKernel attention_kernel_default;
extern const AttentionKernel attention_kernel_avx2;
extern const AttentionKernel attention_kernel_avx512;

}  // namespace longvq
