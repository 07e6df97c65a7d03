// The launchers of nearest codes and of attention, and the structs that they take; see common/status.h.
//
// Shapes: B batch, H heads, Hkv key-value heads, L length, D head_dim, E value_dim, S codes, W window.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"
#include "../../vq/attention_options.h"
#include "../common/sequences.h"

namespace longvq::cuda {

constexpr int64_t kMaxHeadDim = 256;  // of nearest codes
constexpr int64_t kMaxAttentionHeadDim = 128;
constexpr int64_t kCodePadding = 64;  // arrays over codes have room for a multiple of this many

constexpr int64_t padded_head_dim(int64_t head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
}
constexpr int64_t padded_codes(int64_t codes) {
  return (codes + kCodePadding - 1) / kCodePadding * kCodePadding;
}

// The strides of a tensor (B, heads, L, columns) whose columns are contiguous.
struct Strides {
  int64_t batch, head, length;
};

// Whether all rows of a tensor begin at multiples of 16 bytes, so that they can be copied asynchronously. False for
// float32, whose rows are converted instead.
inline bool rows_aligned(const void* data, ElementType type, const Strides& strides) {
  return type != ElementType::kFloat && reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides.batch % 8 == 0 &&
         strides.head % 8 == 0 && strides.length % 8 == 0;
}

// A codebook packed for tensor cores.
struct Codebook {
  int64_t heads, num_codes, head_dim;
  int64_t columns;    // head_dim, padded
  uint16_t* terms;    // (heads, TERMS, padded codes, columns): three bfloat16 terms, or one 16-bit number
  float* half_norms;  // (heads, padded codes): ½‖C_s‖², infinite for padding
};

struct PackCodebook {
  const float* from;  // (heads, codes, head_dim)
  int64_t head_stride, code_stride, column_stride;
  ElementType type;  // kFloat: pack three bfloat16 terms
  Codebook to;
};

// codes = argmin_s ‖k − C_s‖²
struct Assign {
  const void* k;  // (B, H, L, D) of `type`
  ElementType type;
  int64_t batch, length;
  Strides k_strides;
  Codebook codebook;  // in three bfloat16 terms
  int64_t* codes;     // (B, H, L)
};

// Far fields. Block n of queries is the kFarBlock queries from n · kFarBlock. Its far field holds, for each code, the
// count and the mean value of the keys outside the window of all of its queries: keys before the block and, in
// bidirectional attention, keys after it. Bidirectional attention without a window has one far field of all keys.
constexpr int64_t kFarBlock = 128;
constexpr int64_t kFarSegment = 16;  // one block of threads makes this many far fields, each from the one before

struct FarField : Sequences {
  ElementType type;  // of v and means
  int64_t kv_heads, num_codes, value_dim;
  bool causal;
  bool log_counts;  // store logarithms in `counts`
  int64_t window;
  const int64_t* codes;  // (B, Hkv, L): the code of each key
  const void* v;         // (B, Hkv, L, E)
  Strides v_strides;
  PaddingMask mask;
  // Workspaces. First the sums of values and the counts of each segment; then, in place, of all segments up to it.
  float* segment_sums;  // (B, Hkv, segments, S, E)
  int32_t* segment_counts;
  // Sums and counts of the keys before each block, only in bidirectional attention with a window.
  float* before_sums;  // (B, Hkv, far fields, S, E)
  int32_t* before_counts;
  // Results.
  void* means;    // (B, Hkv, far fields, padded codes, padded_value_dim(E))
  float* counts;  // (B, Hkv, far fields, padded codes)

  // Far fields in one row of the tensors. The first block of a causal sequence has none, so packed documents need no
  // more than one sequence of the same length.
  constexpr int64_t num_far_fields() const {
    return all_far() ? (offsets == nullptr ? 1 : documents) : causal ? length / kFarBlock : num_pieces(kFarBlock);
  }
  // Segments in one row of the tensors whose sums are needed. The sums of the last segment of a sequence are needed
  // only if all keys are far.
  constexpr int64_t num_segments() const {
    constexpr int64_t kPositions = kFarBlock * kFarSegment;
    return all_far() ? num_pieces(kPositions) : length / kPositions;
  }
  constexpr bool all_far() const { return window == 0 && !causal; }
};

constexpr int64_t padded_value_dim(int64_t value_dim) {
  return (value_dim + 7) / 8 * 8;
}

// Attention, forward.
struct Attention : Sequences {
  ElementType type;  // of q, far_q, k, v, means and out
  int64_t heads, kv_heads;
  int64_t head_dim, far_head_dim;  // columns of q and k; of far_q and codewords
  int64_t value_dim;
  bool has_far_qk;           // whether far_q is another tensor than q
  AttentionOptions options;  // with the window at most the length
  const void *q, *k, *v;     // (B, H, L, D), (B, Hkv, L, D), (B, Hkv, L, E)
  const void* far_q;  // (B, H, L, far_head_dim): the queries of pairs outside the window; without has_far_qk equal to q
  Strides q_strides, far_q_strides, k_strides, v_strides;
  Codebook codebook;     // packed for `type`
  const int64_t* codes;  // (B, Hkv, L): the code of each key
  PaddingMask mask;
  const float* bias;  // (H, W), in bidirectional attention (H, 2 W − 1), or null
  int64_t bias_head_stride, bias_offset_stride;
  const float* inverse_num_keys;  // (B, L), laplace only: see CountAllowedKeys
  const void* means;              // of the far fields
  const float* counts;            // of the far fields; in the forward of softmax logarithms
  int64_t num_far_fields;         // in one row of the tensors
  void* out;                      // (B, H, L, E)
  float* normalizers;             // (B, H, L, 2): the maximum of the scores and the sum of exp(score − maximum)

  constexpr bool laplace() const { return options.activation == Activation::kLaplace; }
  constexpr bool exact() const { return options.local_keys == LocalKeys::kExact; }
  constexpr bool all_far() const { return options.window == 0 && !options.causal; }
};

// The first step of attention's backward: everything that one kernel can sum without atomics.
struct AttentionGradients {
  Attention forward;  // as in the forward, but `counts` are no logarithms
  const void* grad;   // of out, (B, H, L, E)
  Strides grad_strides;
  const float* deltas;  // (B, H, L), see Deltas
  void *dq, *dfar_q;    // (B, H, L, D) and (B, H, L, far_head_dim), contiguous; without has_far_qk the same array
  // The bias gradient of each block of kGradientRows queries. A bias wider than the window has bias_skipped unused
  // entries before the first one that is used.
  float* dbias_per_block;  // (B, H, blocks, bias_columns), zero before the call; or null
  int64_t bias_columns, bias_skipped;
  // Queries are cut into segments of this many positions, a multiple of kFarBlock. The gradients of codewords, and of
  // the values that codes stand for, are summed for each segment.
  int64_t code_segment;
  float* dcodewords;    // (B, Hkv, segments, S, far_head_dim)
  float* dcode_values;  // (B, Hkv, segments, S, E); null if no sequence has two segments
  // Gradients of the keys' values through far fields, from queries of the key's own segment. Zero before the call.
  float* dv_far_before;  // (B, Hkv, L, E): keys before their queries; with all keys far, of all queries
  float* dv_far_after;   // (B, Hkv, L, E): keys after their queries; null if no far field has such keys
  // Gradients through single keys near their queries.
  float* dv_near;     // (B, Hkv, L, E)
  float* dk_inside;   // (B, Hkv, L, D): of pairs inside the window
  float* dk_outside;  // (B, Hkv, L, far_head_dim): of pairs outside the window
};
constexpr int64_t kGradientRows = 64;

// Sums gradients of codewords over segments, and gradients of code values over later and earlier segments.
struct SumSegments : Sequences {
  int64_t kv_heads, num_codes, far_head_dim, value_dim, code_segment;
  float* dcodewords;  // in/out: the sum over all segments of a sequence overwrites that of its first segment
  // In: dcode_values of each segment. Out: the sum over later segments; with all_far over all segments. Or null.
  float* later;
  float* earlier;  // out: the sum over earlier segments, (B, Hkv, segments, S, E), or null
  bool all_far;

  constexpr int64_t num_segments() const { return num_pieces(code_segment); }
};

// deltas[i] = Σ_e grad[i, e] out[i, e], 0 for ignored queries.
struct Deltas {
  ElementType type;
  int64_t batch, heads, length, value_dim;
  const void *grad, *out;  // (B, H, L, E); `out` is contiguous
  Strides grad_strides;
  PaddingMask mask;
  float* deltas;  // (B, H, L)
};

// Adds up dk, dfar_k and dv from their terms. With key_grad="cluster" the keys of a code share the gradient of its
// codeword equally: each gets dcodewords / counts, plus the mean of dk_outside over the keys of the code.
struct FinishKeys : Sequences {
  ElementType type;
  int64_t kv_heads, num_codes, head_dim, far_head_dim, value_dim;
  bool has_far_qk;
  const int64_t* codes;
  PaddingMask mask;
  const float *dk_inside, *dv_near, *dv_far_before, *dv_far_after;  // see AttentionGradients
  const float *dcodewords, *counts, *means;                         // null: the gradient of a codeword reaches no key
  const float *later, *earlier;  // see SumSegments; null if no sequence has two segments
  int64_t window, code_segment;
  bool all_far;
  void *dk, *dfar_k;  // (B, Hkv, L, D), (B, Hkv, L, far_head_dim), contiguous; without has_far_qk all is in dk
  void* dv;           // (B, Hkv, L, E), contiguous
};

// One over the number of keys that each query may attend. Laplace attention scales its scores by it.
struct CountAllowedKeys : Sequences {
  bool causal;
  PaddingMask mask;
  float* inverse_num_keys;  // (B, L)
};

extern "C" {
int longvq_cuda_pack_codebook(const PackCodebook* problem, void* stream);
int longvq_cuda_assign(const Assign* problem, void* stream);
int longvq_cuda_far_field(const FarField* problem, void* stream);
int longvq_cuda_count_allowed_keys(const CountAllowedKeys* problem, void* stream);
int longvq_cuda_attention(const Attention* problem, void* stream);
int longvq_cuda_attention_gradients(const AttentionGradients* problem, void* stream);
int longvq_cuda_deltas(const Deltas* problem, void* stream);
int longvq_cuda_sum_segments(const SumSegments* problem, void* stream);
int longvq_cuda_finish_keys(const FinishKeys* problem, void* stream);
}

}  // namespace longvq::cuda
