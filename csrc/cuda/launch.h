// What the host may call of the CUDA kernels: plain C functions and structs of plain numbers, neither torch's nor
// CUDA's headers. Pointers are to device memory, strides in elements, `stream` a cudaStream_t. Every function returns
// 0, an error of the CUDA runtime, or kNotCovered, and does not wait for the device.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace longvq::cuda {

constexpr int kNotCovered = -1;     // there is no kernel for these sizes
constexpr int64_t kMaxDepth = 256;  // columns of keys and codewords
constexpr int64_t kMaxAttentionDepth = 128;
constexpr int64_t kCodeUnit = 64;  // codes are padded to a multiple of it

constexpr int64_t padded_depth(int64_t depth) {
  return depth <= 64 ? 64 : depth <= 128 ? 128 : 256;
}
constexpr int64_t padded_codes(int64_t codes) {
  return (codes + kCodeUnit - 1) / kCodeUnit * kCodeUnit;
}

// A codebook as tensor cores take it.
struct Codebook {
  int64_t heads, codes, depth;
  int64_t columns;    // depth, padded
  uint16_t* parts;    // (heads, PARTS, padded_codes, columns): three bfloat16, or one number of a 16-bit type
  float* half_norms;  // (heads, padded_codes): ½‖C_s‖², infinite where there is no code
};

struct PackCodebook {
  const float* from;  // (heads, codes, depth)
  int64_t head_stride, code_stride, depth_stride;
  ElementType type;  // kFloat: three parts
  Codebook to;
};

struct Assign {
  const void* keys;  // (batch, heads, length, depth) of `type`, depth innermost and contiguous
  ElementType type;
  int64_t batch, length;
  int64_t batch_stride, head_stride, length_stride;
  Codebook codebook;  // in three parts
  int64_t* codes;     // (batch, heads, length)
};

// Which positions belong together: the rows of a batch, or documents packed into one row, where document n has the
// positions offsets[n] .. offsets[n + 1].
struct Sequences {
  int64_t batch, length;   // of the tensors; of documents the batch is 1
  const int32_t* offsets;  // (documents + 1,) or null
  int64_t documents;

  constexpr int64_t sequences() const { return offsets == nullptr ? batch : documents; }
  // Into how many pieces of `unit` positions a row of the tensors is cut: none belongs to two documents, see
  // sequences.h, and there may be more than needed.
  constexpr int64_t pieces(int64_t unit) const {
    return offsets == nullptr ? (length + unit - 1) / unit : length / unit + documents;
  }
};

// Far fields: for every kFarBlock queries the number and the mean value, for each code, of the keys that are outside
// the window of all of them. Keys before them and, bidirectional, behind them; without a window and bidirectional all
// keys, and one far field serves everybody.
constexpr int64_t kFarBlock = 128;
constexpr int64_t kFarSegment = 16;  // far fields that one block of threads makes, the next one out of each

struct FarField : Sequences {
  ElementType type;              // of values and means
  int64_t heads, codes, values;  // heads of keys
  bool causal, logarithm;        // whether `numbers` are logarithms
  int64_t window;
  const int64_t* code_of_key;  // (batch, heads, length)
  const void* v;               // (batch, heads, length, values), values innermost and contiguous
  int64_t v_batch, v_head, v_length;
  const uint8_t* ignored;  // (batch, length) or null
  int64_t ignored_batch, ignored_length;
  // Workspaces: of each segment the sums of values and the numbers of its keys; of all far fields those of keys before.
  float* segment_sums;  // (batch, heads, segments, codes, values); then those of all segments before
  int32_t* segment_numbers;
  float* before_sums;  // (batch, heads, far_fields, codes, values); only bidirectional with a window
  int32_t* before_numbers;
  void* means;     // (batch, heads, far_fields, padded codes, value_pitch)
  float* numbers;  // (batch, heads, far_fields, padded codes)

  // Of a row of the tensors. Causal, the first block of a sequence has no far field, so that there are no more of them
  // for documents than for one sequence; nor does the last segment need its sums, unless all is far.
  constexpr int64_t far_fields() const {
    return all_far() ? (offsets == nullptr ? 1 : documents) : causal ? length / kFarBlock : pieces(kFarBlock);
  }
  constexpr int64_t segments() const {
    constexpr int64_t kPositions = kFarBlock * kFarSegment;
    return all_far() ? pieces(kPositions) : length / kPositions;
  }
  constexpr bool all_far() const { return window == 0 && !causal; }
};

constexpr int64_t value_pitch(int64_t values) {
  return (values + 7) / 8 * 8;
}

struct Attention : Sequences {
  ElementType type;  // of q, k, v, means, out
  int64_t heads, kv_heads, values;
  int64_t near_depth, far_depth, far_first;  // pairs outside the window: columns of q from far_first
  bool exact, causal, laplace;
  int64_t window;
  float scale;
  const void *q, *k, *v;  // (batch, heads, length, columns), columns innermost and contiguous
  int64_t q_batch, q_head, q_length, k_batch, k_head, k_length, v_batch, v_head, v_length;
  Codebook codebook;           // of the far columns, in the parts of `type`
  const int64_t* code_of_key;  // (batch, kv_heads, length)
  const uint8_t* ignored;      // (batch, length) or null
  int64_t ignored_batch, ignored_length;
  const float* bias;  // (heads, W or 2 W - 1) or null
  int64_t bias_head, bias_offset;
  const float* units;  // (batch, length): laplace, one over the number of keys allowed
  const void* means;
  const float* numbers;
  int64_t far_fields;  // of a row of the tensors
  void* out;           // (batch, heads, length, values)
  float* normalizers;  // (batch, heads, length, 2)

  constexpr bool all_far() const { return window == 0 && !causal; }
};

// Gradients of attention. `forward` is as it was, but for `numbers`, which are numbers and no logarithms.
struct AttentionGradients {
  Attention forward;
  const void* grad;  // (batch, heads, length, values), values innermost and contiguous
  int64_t grad_batch, grad_head, grad_length;
  const float* deltas;  // (batch, heads, length)
  void* dq;             // (batch, heads, length, columns of q)
  // For each piece of kGradientRows queries; or null. A bias wider than the window is skipped by bias_skipped entries.
  float* dbias_of_blocks;  // (batch, heads, blocks, bias_columns), zero before
  int64_t bias_columns, bias_skipped;
  // What codes get from the queries of each segment of so many, a multiple of kFarBlock: gradients of codewords, and of
  // the values that they stand for, if no sequence has two segments null.
  int64_t code_segment;
  float* dcodes;       // (batch, kv_heads, segments, codes, far_depth); then of a sequence's first segment the sum
  float* code_values;  // (batch, kv_heads, segments, codes, values)
  float* dv_far;       // (batch, kv_heads, length, values), zero before: from queries behind their keys, or of all
  float* dv_ahead;     // the same from queries before their keys, null if there are none
  float* dv_near;      // the same size
  float* dk_inside;    // (batch, kv_heads, length, near_depth)
  float* dk_outside;   // (batch, kv_heads, length, far_depth): of pairs near, but outside the window
};
constexpr int64_t kGradientRows = 64;

// What codes got from the queries of all segments, and, of values, from those of later and earlier ones alone.
struct SumSegments : Sequences {
  int64_t heads, codes, far_depth, values, code_segment;
  float* dcodes;   // as above, of which the sum takes the first segment's place
  float* later;    // what is in code_values, replaced; of one far field for all the sum of all
  float* earlier;  // the same size, or null
  bool all_far;

  constexpr int64_t segments() const { return pieces(code_segment); }
};

// deltas[i] = Σ_e grad[i, e] out[i, e], 0 for ignored queries.
struct Deltas {
  ElementType type;
  int64_t batch, heads, length, values;
  const void *grad, *out;  // `out` contiguous
  int64_t grad_batch, grad_head, grad_length;
  const uint8_t* ignored;
  int64_t ignored_batch, ignored_length;
  float* deltas;
};

// dk and dv from their parts. The keys of a code share what it got equally: dcodes / numbers + means of dk_outside.
struct FinishKeys : Sequences {
  ElementType type;
  int64_t heads, codes, near_depth, far_depth, far_first, values;
  const int64_t* code_of_key;
  const uint8_t* ignored;
  int64_t ignored_batch, ignored_length;
  const float *dk_inside, *dv_near, *dv_far, *dv_ahead;
  const float *dcodes, *numbers, *means;  // null: codes keep what they got
  // With values from queries of other segments, see SumSegments; null if there is one segment.
  const float *later, *earlier;
  int64_t window, code_segment;
  bool all_far;
  void *dk, *dv;  // (batch, heads, length, columns)
};

// For attention with laplace: one over the number of keys that each query may attend.
struct CountKeys : Sequences {
  bool causal;
  const uint8_t* ignored;  // (batch, length) or null
  int64_t ignored_batch, ignored_length;
  float* units;  // (batch, length)
};

// The state space scan in chunks of kScanSteps steps, whose tables are made first.
constexpr int64_t kScanSteps = 32, kScanChunks = 32;
constexpr int64_t kScanTile = kScanSteps * kScanChunks;  // steps that a warp has in work
constexpr int64_t kScanGroup = 16;                       // complex modes at a time
constexpr int64_t kScanMaxModes = 32;                    // d_state = 64; more tables don't fit

constexpr int64_t padded_modes(int64_t modes) {
  return (modes + kScanGroup - 1) / kScanGroup * kScanGroup;
}

struct ScanModes {
  int64_t channels, modes;
  bool complex_modes;
  const float* log_decay;  // (channels, modes), complex ones as pairs
  const float* weight;     // the same
  const float* skip;       // (channels,) or null
};

enum class ScanUse : int32_t { kScan, kAdjoint, kGradients };

struct ScanTables {
  ScanModes modes;
  ElementType type;  // kFloat: in three parts
  ScanUse use;
  uint16_t* tables;  // (channels, scan_table_size)
  float* decays;     // (channels, padded modes, kScanPowers) complex numbers
};
constexpr int64_t kScanPowers = 5;  // of the decay: 1, T, 4 T, 8 T, 16 T with T = kScanSteps

// Numbers of 16 bits in the tables of a channel: K, and for each group of modes into and out of the state.
constexpr int64_t scan_table_size(int64_t modes, int64_t parts) {
  return parts * (kScanSteps + 8) * (16 + padded_modes(modes) / kScanGroup * 2 * kScanSteps);
}

// The tables for gradients of the parameters: for each group of modes four.
constexpr int64_t scan_gradient_table_size(int64_t modes, int64_t parts) {
  return parts * (kScanSteps + 8) * (padded_modes(modes) / kScanGroup * 4 * kScanSteps);
}

struct Scan : Sequences {
  ScanModes modes;
  ElementType type;  // of u and y
  bool reverse, adjoint;
  const void* u;  // (batch, length, channels), any strides
  int64_t u_batch, u_length, u_channel;
  void* y;                 // (batch, length, channels)
  const uint8_t* ignored;  // (batch, length) or null
  int64_t ignored_batch, ignored_length;
  const float* initial_state;  // (sequences, channels, modes), complex ones as pairs, or null
  float* final_state;          // the same
  const uint16_t* tables;
  const float* decays;
  // Segments run at the same time, each of so many steps, a multiple of kScanTile.
  int64_t segment_length;
  float* segment_states;  // (batch, channels, segments, modes) complex numbers; null if no sequence has two

  constexpr int64_t segments() const { return pieces(segment_length); }  // of a row of the tensors
};

// Gradients of the parameters, of every segment by itself.
struct ScanGradients {
  Scan scan;         // its inputs, states, segments and tables; no outputs
  const void* grad;  // of y, (batch, length, channels)
  int64_t grad_batch, grad_length, grad_channel;
  const float* grad_state;  // (sequences, channels, modes)
  float* segment_states;  // (batch, channels, segments, modes, 2) complex numbers; null if no sequence has two segments
  double* dmodes;  // (batch, segments, channels, modes, 4), zero before: of weight and log_decay, real and imaginary
  double* dskip;   // (batch, segments, channels), zero before
};

// Sums them over the segments. Of complex parameters PyTorch keeps the conjugate.
struct SumScanGradients {
  ScanModes modes;
  int64_t segments;  // of all rows of the batch
  const double *dmodes, *dskip;
  float *dweight, *dlog_decay, *dskip_sum;  // (channels, modes), the last (channels,) or null
};

extern "C" {
const char* longvq_cuda_error_text(int error);
int longvq_cuda_pack_codebook(const PackCodebook* problem, void* stream);
int longvq_cuda_assign(const Assign* problem, void* stream);
int longvq_cuda_far_field(const FarField* problem, void* stream);
int longvq_cuda_count_keys(const CountKeys* problem, void* stream);
int longvq_cuda_attention(const Attention* problem, void* stream);
int longvq_cuda_attention_gradients(const AttentionGradients* problem, void* stream);
int longvq_cuda_deltas(const Deltas* problem, void* stream);
int longvq_cuda_sum_segments(const SumSegments* problem, void* stream);
int longvq_cuda_finish_keys(const FinishKeys* problem, void* stream);
int longvq_cuda_scan_tables(const ScanTables* problem, void* stream);
int longvq_cuda_scan(const Scan* problem, void* stream);
int longvq_cuda_scan_gradients(const ScanGradients* problem, void* stream);
int longvq_cuda_sum_scan_gradients(const SumScanGradients* problem, void* stream);
}

}  // namespace longvq::cuda
