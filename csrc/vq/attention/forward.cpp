#include "attention.h"

#include <torch/csrc/stable/ops.h>

#include "forward_head.h"
#include "parallel_heads.h"

namespace longvq {
namespace {

using torch::headeronly::ScalarType;

void run(const Problem& p, void* out, float* normalizers) {
  const Codebooks codebooks(p, false);
  work_through(
      p, [](int64_t length) { return (length + kBlock - 1) / kBlock; },
      [&](const Document& document, int64_t kv_head) {
        return std::make_unique<Head>(p, codebooks, out, normalizers, document, kv_head);
      },
      [&] { return Scratch(p); }, [](Head& head, int64_t block, Scratch& scratch) { head.attend(block, scratch); },
      [](int64_t, Head&) {});
}

}  // namespace

AttentionResult vq_attention_cpu(const AttentionInputs& inputs, const AttentionOptions& options) {
  const Problem p(inputs, options);
  Tensor out = torch::stable::new_empty(p.v, {p.batch, p.heads, p.length, p.values}, p.v.scalar_type());
  Tensor normalizers = torch::stable::new_empty(p.q, {p.batch, p.heads, p.length, 2}, ScalarType::Float);
  if (!p.empty()) {
    run(p, out.mutable_data_ptr(), static_cast<float*>(normalizers.mutable_data_ptr()));
  }
  return {out, normalizers};
}

}  // namespace longvq
