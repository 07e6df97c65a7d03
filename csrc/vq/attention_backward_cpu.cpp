#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "attention.h"
#include "attention_gradient_parts.h"
#include "attention_work.h"

namespace longvq {
namespace {

using torch::headeronly::ScalarType;

void check_result(const Problem& p, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(
      x.is_cpu() && x.dim() == 4 && x.size(0) == p.batch && x.size(1) == p.heads && x.size(2) == p.length &&
          x.size(3) == p.values && x.scalar_type() == p.v.scalar_type(),
      "vq_attention_backward: ", name, " must be (B, H, L, E) with the dtype of v");
}

// Gradients of the biases of each document and key-value head, by query head of the group.
using BiasGradients = std::vector<std::vector<std::vector<double>>>;

void run(const Problem& p, const GradientTensors& tensors, BiasGradients& d_bias) {
  const Codebooks codebooks(p, true);
  work_through(
      p, [&](int64_t length) { return GradientParts::parts_of(p, length); },
      [&](const Document& document, int64_t kv_head) {
        return std::make_unique<GradientParts>(p, codebooks, tensors, document, kv_head);
      },
      [&] { return GradientScratch(p); },
      [](GradientParts& parts, int64_t part, GradientScratch& scratch) { parts.run(part, scratch); },
      [&](int64_t pair, GradientParts& parts) { d_bias[pair] = parts.join(); });
}

Tensor bias_gradient(const Problem& p, const BiasGradients& d_bias) {
  if (!p.bias.has_value()) {
    return torch::stable::new_empty(p.q, {0}, p.q.scalar_type());
  }
  const int64_t columns = p.bias->size(1);
  std::vector<double> sums(p.heads * columns, 0.0);
  for (int64_t item = 0; item < static_cast<int64_t>(d_bias.size()); ++item) {
    for (int64_t g = 0; g < static_cast<int64_t>(d_bias[item].size()); ++g) {
      const std::vector<double>& of = d_bias[item][g];
      const int64_t head = item % p.kv_heads * p.group + g;
      for (int64_t i = 0; i < p.bias_columns(); ++i) {
        sums[head * columns + bias_column(p, i)] += of[i];
      }
    }
  }
  Tensor result = torch::stable::new_empty(*p.bias, {p.heads, columns}, ScalarType::Float);
  std::copy(sums.begin(), sums.end(), static_cast<float*>(result.mutable_data_ptr()));
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> vq_attention_backward_cpu(
    const Tensor& grad, const Tensor& out, const Tensor& normalizers, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& codebook, const Tensor& codes, const OptionalTensor& bias, const OptionalTensor& key_padding_mask,
    const OptionalTensor& cu_seqlens, double scale, bool causal, int64_t window, const std::string& activation,
    const std::string& local_keys, const std::string& key_grad, int64_t near_dim) {
  const Problem p(
      q, k, v, codebook, codes, bias, key_padding_mask, cu_seqlens, scale, causal, window, activation, local_keys,
      key_grad, near_dim);
  check_result(p, grad, "grad");
  check_result(p, out, "out");
  STD_TORCH_CHECK(
      normalizers.is_cpu() && normalizers.dim() == 4 && normalizers.size(0) == p.batch &&
          normalizers.size(1) == p.heads && normalizers.size(2) == p.length && normalizers.size(3) == 2 &&
          normalizers.scalar_type() == ScalarType::Float,
      "vq_attention_backward: normalizers must be (B, H, L, 2), float32");
  Tensor dq = torch::stable::new_empty(q, {p.batch, p.heads, p.length, p.depth}, q.scalar_type());
  Tensor dk = torch::stable::new_empty(k, {p.batch, p.kv_heads, p.length, p.depth}, k.scalar_type());
  Tensor dv = torch::stable::new_empty(v, {p.batch, p.kv_heads, p.length, p.values}, v.scalar_type());
  BiasGradients d_bias(p.pairs());
  if (p.empty()) {
    torch::stable::zero_(dk), torch::stable::zero_(dv);  // of keys that no head of queries looks at
  } else {
    const GradientTensors tensors{
        grad, out, normalizers, dq.mutable_data_ptr(), dk.mutable_data_ptr(), dv.mutable_data_ptr()};
    run(p, tensors, d_bias);
  }
  return {dq, dk, dv, bias_gradient(p, d_bias)};
}

}  // namespace longvq
