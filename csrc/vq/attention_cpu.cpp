#include "attention.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../cpu_capability.h"
#include "../share_out.h"
#include "attention_head.h"

namespace longvq {
namespace {

using torch::headeronly::ScalarType;

LONGVQ_DEFINE_KERNEL_OF_THIS_CPU(AttentionKernel, attention_kernel)

void run(const Problem& p) {
  const int64_t pairs = static_cast<int64_t>(p.documents.size()) * p.kv_heads;
  const auto scratch_of = [&] { return Scratch(p); };
  if (!p.everything_far()) {
    share_out(pairs, scratch_of, [&](int64_t item, Scratch& scratch) {
      Head head(p, p.documents[item / p.kv_heads], item % p.kv_heads);
      FarField far(p);
      head.from_start(far, scratch);
      if (!p.causal) {
        head.from_end(far, scratch);
      }
    });
    return;
  }
  // One far field serves all queries of a head, which then are independent.
  std::vector<std::unique_ptr<Head>> heads(pairs);
  std::vector<std::unique_ptr<FarField>> fields(pairs);
  share_out(pairs, [] { return 0; }, [&](int64_t item, int) {
    heads[item] = std::make_unique<Head>(p, p.documents[item / p.kv_heads], item % p.kv_heads);
    fields[item] = std::make_unique<FarField>(p);
    fields[item]->add(p, heads[item]->keys, 0, heads[item]->length);
  });
  struct Block {
    int64_t pair, first;
  };
  std::vector<Block> blocks;
  for (int64_t pair = 0; pair < pairs; ++pair) {
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

std::vector<Document> documents_of(int64_t batch, int64_t length, const OptionalTensor& cu_seqlens) {
  std::vector<Document> documents;
  if (!cu_seqlens.has_value()) {
    for (int64_t row = 0; row < batch; ++row) {
      documents.push_back({row, 0, length});
    }
    return documents;
  }
  STD_TORCH_CHECK(
      cu_seqlens->is_cpu() && cu_seqlens->dim() == 1 && cu_seqlens->scalar_type() == ScalarType::Int &&
          cu_seqlens->size(0) >= 1 && batch == 1,
      "vq_attention: cu_seqlens must be (N + 1,), int32, with a batch of one row");
  const auto* offsets = static_cast<const int32_t*>(cu_seqlens->const_data_ptr());
  const int64_t count = cu_seqlens->size(0) - 1, stride = cu_seqlens->stride(0);
  STD_TORCH_CHECK(
      offsets[0] == 0 && offsets[count * stride] == length, "vq_attention: cu_seqlens must run from 0 to L = ", length);
  for (int64_t n = 0; n < count; ++n) {
    const int64_t start = offsets[n * stride], end = offsets[(n + 1) * stride];
    STD_TORCH_CHECK(start <= end, "vq_attention: cu_seqlens must not fall");
    documents.push_back({0, start, end - start});
  }
  return documents;
}

}  // namespace

std::tuple<Tensor, Tensor> vq_attention_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& codebook, const Tensor& codes,
    const OptionalTensor& bias, const OptionalTensor& key_padding_mask, const OptionalTensor& cu_seqlens, double scale,
    bool causal, int64_t window, const std::string& activation, const std::string& local_keys, const std::string&) {
  // Python has checked them with better messages: these only keep wrong calls of the bare operator from memory.
  for (const Tensor* x : {&q, &k, &v}) {
    STD_TORCH_CHECK(
        x->is_cpu() && x->dim() == 4 && x->scalar_type() == ScalarType::Float,
        "vq_attention: the compiled CPU kernel takes float32 q, k and v with four dimensions");
  }
  STD_TORCH_CHECK(
      codebook.is_cpu() && codebook.dim() == 3 && codebook.scalar_type() == ScalarType::Float,
      "vq_attention: codebook must be (Hkv, S, D), float32");
  const AttentionKernel& kernel = kernel_of_this_cpu();
  Problem p{q, k, v, codebook, codes, bias, key_padding_mask, {}, static_cast<float>(scale), causal, window,
            activation == "laplace" ? AttentionWeight::kLaplace : AttentionWeight::kSoftmax,
            local_keys == "exact" && window > 0, q.size(0), q.size(1), k.size(1), 0, q.size(2), q.size(3), v.size(3),
            codebook.size(1), 0, kernel, 0, 0, 0, nullptr, nullptr};
  STD_TORCH_CHECK(
      p.kv_heads >= 1 && p.heads % p.kv_heads == 0 && p.depth >= 1 && p.values >= 1 && p.num_codes >= 1 && window >= 0,
      "vq_attention: wrong sizes");
  STD_TORCH_CHECK(
      k.size(0) == p.batch && k.size(2) == p.length && k.size(3) == p.depth && v.size(0) == p.batch &&
          v.size(1) == p.kv_heads && v.size(2) == p.length && codebook.size(0) == p.kv_heads &&
          codebook.size(2) == p.depth,
      "vq_attention: shapes of q, k, v and codebook do not fit each other");
  STD_TORCH_CHECK(
      codes.is_cpu() && codes.dim() == 3 && codes.scalar_type() == ScalarType::Long && codes.size(0) == p.batch &&
          codes.size(1) == p.kv_heads && codes.size(2) == p.length,
      "vq_attention: codes must be (B, Hkv, L), int64");
  STD_TORCH_CHECK(
      !bias.has_value() ||
          (bias->is_cpu() && bias->dim() == 2 && bias->scalar_type() == ScalarType::Float && bias->size(0) == p.heads &&
           (window == 0 || bias->size(1) == (causal ? window : 2 * window - 1))),
      "vq_attention: bias must be (H, W) or (H, 2W - 1), float32");
  STD_TORCH_CHECK(
      !key_padding_mask.has_value() ||
          (key_padding_mask->is_cpu() && key_padding_mask->dim() == 2 && key_padding_mask->size(0) == p.batch &&
           key_padding_mask->size(1) == p.length && key_padding_mask->scalar_type() == ScalarType::Bool),
      "vq_attention: key_padding_mask must be (B, L), bool");

  p.documents = documents_of(p.batch, p.length, cu_seqlens);
  for (int64_t row = 0; row < p.batch; ++row) {
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      const auto* of = static_cast<const int64_t*>(codes.const_data_ptr()) + row * codes.stride(0) + head * codes.stride(1);
      for (int64_t i = 0; i < p.length; ++i) {
        const int64_t code = of[i * codes.stride(2)];
        STD_TORCH_CHECK(code >= 0 && code < p.num_codes, "vq_attention: codes must lie in [0, S), got ", code);
      }
    }
  }

  Tensor out = torch::stable::new_empty(v, {p.batch, p.heads, p.length, p.values}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.heads, p.length}, ScalarType::Float);
  p.window = std::min(p.window, p.length);  // a wider window sees no more
  if (p.batch == 0 || p.heads == 0 || p.length == 0) {
    return {out, lse};
  }
  p.group = p.heads / p.kv_heads;
  p.reach = std::max<int64_t>(p.window - 1, 0);
  p.far_columns = round_up(p.num_codes, kernel.lanes);
  p.value_columns = round_up(p.values, kernel.lanes);
  const int64_t near = p.everything_far() ? 0 : std::min(p.length, kBlock + (causal ? 1 : 2) * p.reach);
  p.near_columns = round_up(near, kernel.lanes);
  p.out = static_cast<float*>(out.mutable_data_ptr());
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  run(p);
  return {out, lse};
}

}  // namespace longvq
