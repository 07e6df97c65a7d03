#include "attention.h"

#include <torch/csrc/stable/ops.h>

#include "attention_head.h"
#include "attention_work.h"

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

std::tuple<Tensor, Tensor> vq_attention_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& codebook, const Tensor& codes,
    const OptionalTensor& bias, const OptionalTensor& key_padding_mask, const OptionalTensor& cu_seqlens, double scale,
    bool causal, int64_t window, const std::string& activation, const std::string& local_keys,
    const std::string& key_grad, int64_t near_dim) {
  const Problem p(
      q, k, v, codebook, codes, bias, key_padding_mask, cu_seqlens, scale, causal, window, activation, local_keys,
      key_grad, near_dim);
  Tensor out = torch::stable::new_empty(v, {p.batch, p.heads, p.length, p.values}, v.scalar_type());
  Tensor normalizers = torch::stable::new_empty(q, {p.batch, p.heads, p.length, 2}, ScalarType::Float);
  if (!p.empty()) {
    run(p, out.mutable_data_ptr(), static_cast<float*>(normalizers.mutable_data_ptr()));
  }
  return {out, normalizers};
}

}  // namespace longvq
