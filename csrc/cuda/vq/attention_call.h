// One call of the attention operator, checked and turned into what the launchers take.
#pragma once

#include <optional>

#include "../../vq/attention_operator.h"
#include "packed_codebook.h"

namespace longvq::cuda {

// The tensors that a far field is made in; sets the pointers of the problem.
struct FarFieldTensors {
  Tensor segment_sums, segment_counts, before_sums, before_counts, means, counts;

  FarFieldTensors(FarField& problem, const Tensor& like);
};

// `p` points into the tensors of this struct and into the tensors that the constructor got.
struct AttentionCall {
  static constexpr const char* kOp = "vq_attention";

  Tensor q, k, v, far_q, codes;
  OptionalTensor offsets, bias, inverse_num_keys;
  std::optional<PackedCodebook> packed;
  std::optional<FarFieldTensors> far_field;
  Attention p{};
  int64_t bias_skipped = 0;  // columns of a bidirectional bias, on either side, that no pair of these lengths uses

  // Raises on wrong arguments.
  AttentionCall(const AttentionInputs& inputs, const AttentionOptions& options);

  bool is_empty() const { return p.batch == 0 || p.heads == 0 || p.length == 0 || p.value_dim == 0; }

  // Packs the codebook and makes the far fields. Their counts are logarithms if `log_counts` is true and the activation
  // is softmax.
  void prepare(const Tensor& codebook, bool log_counts, void* stream);

  // The far field of these keys with values from v, before its tensors are set.
  FarField far_field_problem(ElementType type, bool log_counts) const;
};

}  // namespace longvq::cuda
