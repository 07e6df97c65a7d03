#include "attention.h"

#include <torch/csrc/stable/ops.h>

#include <memory>

#include "../share_out.h"
#include "attention_head.h"

namespace longvq {
namespace {

using torch::headeronly::ScalarType;

void run(const Problem& p, void* out, float* normalizers) {
  std::vector<std::unique_ptr<Head>> heads(p.pairs());
  share_out(p.pairs(), [] { return 0; }, [&](int64_t item, int) {
    heads[item] = std::make_unique<Head>(p, out, normalizers, p.documents[item / p.kv_heads], item % p.kv_heads);
  });
  struct Block {
    const Head* head;
    int64_t number;
  };
  std::vector<Block> blocks;
  for (const auto& head : heads) {
    for (int64_t number = 0; number * kBlock < head->length; ++number) {
      blocks.push_back({head.get(), number});
    }
  }
  share_out(static_cast<int64_t>(blocks.size()), [&] { return Scratch(p); }, [&](int64_t item, Scratch& scratch) {
    blocks[item].head->attend(blocks[item].number, scratch);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> vq_attention_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& codebook, const Tensor& codes,
    const OptionalTensor& bias, const OptionalTensor& key_padding_mask, const OptionalTensor& cu_seqlens, double scale,
    bool causal, int64_t window, const std::string& activation, const std::string& local_keys,
    const std::string& key_grad) {
  const Problem p(
      q, k, v, codebook, codes, bias, key_padding_mask, cu_seqlens, scale, causal, window, activation, local_keys,
      key_grad);
  Tensor out = torch::stable::new_empty(v, {p.batch, p.heads, p.length, p.values}, v.scalar_type());
  Tensor normalizers = torch::stable::new_empty(q, {p.batch, p.heads, p.length, 2}, ScalarType::Float);
  if (!p.empty()) {
    run(p, out.mutable_data_ptr(), static_cast<float*>(normalizers.mutable_data_ptr()));
  }
  return {out, normalizers};
}

}  // namespace longvq
