// The buffers of one block of queries in the forward, for attention and for its step.
#pragma once

#include "../../common/aligned_array.h"
#include "kernel/attention_kernel.h"

namespace longvq {

struct BlockBuffers {
  int64_t far_columns, near_columns, value_columns;  // padded: codes; the most near keys of a block; E
  AlignedArray<float> queries, far_queries, scores, exact_scores, out, weight_sum, max_score;

  // A call is an AttentionCall or a StepCall.
  template <typename Call>
  BlockBuffers(const Call& call, int64_t far_columns, int64_t near_columns, int64_t value_columns)
      : far_columns(far_columns), near_columns(near_columns), value_columns(value_columns),
        queries(aligned_array<float>(kBlock * call.head_dim)),
        far_queries(aligned_array<float>(call.has_far_q ? kBlock * call.far_head_dim : 0)),
        scores(aligned_array<float>(kBlock * (far_columns + near_columns))),
        exact_scores(aligned_array<float>(call.uses_exact_keys ? kBlock * near_columns : 0)),
        out(aligned_array<float>(kBlock * value_columns)), weight_sum(aligned_array<float>(kBlock)),
        max_score(aligned_array<float>(kBlock)) {}

  // A block that uses the buffers. Its other members are zero.
  AttentionBlock new_block(bool has_far_q) const {
    AttentionBlock block{};
    block.queries = queries.get();
    block.far_queries = has_far_q ? far_queries.get() : block.queries;
    block.value_columns = value_columns;
    block.scores = scores.get();
    block.exact_scores = exact_scores.get();
    block.out = out.get();
    block.weight_sum = weight_sum.get();
    block.max_score = max_score.get();
    return block;
  }
};

}  // namespace longvq
