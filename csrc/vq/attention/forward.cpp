#include "attention.h"

#include <torch/csrc/stable/ops.h>

#include "forward_head.h"
#include "parallel_heads.h"

namespace longvq {
namespace {

using torch::headeronly::ScalarType;

void run(const AttentionCall& call, void* out, float* normalizers) {
  const Codebooks codebooks(call, false);
  for_each_work_item(
      call, [](int64_t length) { return (length + kBlock - 1) / kBlock; },
      [&](const Document& document, int64_t kv_head) {
        return std::make_unique<ForwardHead>(call, codebooks, out, normalizers, document, kv_head);
      },
      [&] { return ForwardScratch(call); },
      [](ForwardHead& head, int64_t block, ForwardScratch& scratch) { head.attend(block, scratch); },
      [](int64_t, ForwardHead&) {});
}

}  // namespace

AttentionResult vq_attention_cpu(const AttentionInputs& inputs, const AttentionOptions& options) {
  const AttentionCall call(inputs, options);
  Tensor out =
      torch::stable::new_empty(call.v, {call.batch, call.heads, call.length, call.value_dim}, call.v.scalar_type());
  Tensor normalizers = torch::stable::new_empty(call.q, {call.batch, call.heads, call.length, 2}, ScalarType::Float);
  if (!call.empty()) {
    run(call, out.mutable_data_ptr(), static_cast<float*>(normalizers.mutable_data_ptr()));
  }
  return {out, normalizers};
}

}  // namespace longvq
