#include "attention.h"

#include <torch/csrc/stable/ops.h>

#include <memory>

#include "../share_out.h"
#include "attention_head.h"

namespace longvq {
namespace {

using torch::headeronly::ScalarType;

void run(const Problem& p, void* out, float* lse) {
  const auto scratch_of = [&] { return Scratch(p); };
  const auto head_of = [&](int64_t item) {
    return Head(p, out, lse, p.documents[item / p.kv_heads], item % p.kv_heads);
  };
  if (!p.everything_far()) {
    share_out(p.pairs(), scratch_of, [&](int64_t item, Scratch& scratch) {
      Head head = head_of(item);
      FarField far(p, Sums::kRows);
      head.from_start(far, scratch);
      if (!p.causal && head.length > 0) {
        head.from_end(far, scratch);
      }
    });
    return;
  }
  // One far field serves all queries of a head, which then are independent.
  std::vector<std::unique_ptr<Head>> heads(p.pairs());
  std::vector<std::unique_ptr<FarField>> fields(p.pairs());
  share_out(p.pairs(), [] { return 0; }, [&](int64_t item, int) {
    heads[item] = std::make_unique<Head>(head_of(item));
    fields[item] = std::make_unique<FarField>(p, Sums::kRows);
    fields[item]->add(p, heads[item]->keys, 0, heads[item]->length);
  });
  struct Block {
    int64_t pair, first;
  };
  std::vector<Block> blocks;
  for (int64_t pair = 0; pair < p.pairs(); ++pair) {
    for (int64_t first = 0; first < heads[pair]->length; first += kBlock) {
      blocks.push_back({pair, first});
    }
  }
  share_out(static_cast<int64_t>(blocks.size()), scratch_of, [&](int64_t item, Scratch& scratch) {
    const auto [pair, first] = blocks[item];
    const int64_t last = std::min(first + kBlock, heads[pair]->length);
    heads[pair]->attend(first, last, *fields[pair], 0, 0, Pass::kOnly, scratch);
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
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.heads, p.length}, ScalarType::Float);
  if (!p.empty()) {
    run(p, out.mutable_data_ptr(), static_cast<float*>(lse.mutable_data_ptr()));
  }
  return {out, lse};
}

}  // namespace longvq
