#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "attention.h"
#include "backward_ranges.h"
#include "parallel_heads.h"

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

AttentionGradientTensors vq_attention_backward_cpu(
    const Tensor& grad, const Tensor& out, const Tensor& normalizers, const AttentionInputs& inputs,
    const AttentionOptions& options) {
  const Problem p(inputs, options);
  check_result(p, grad, "grad");
  check_result(p, out, "out");
  STD_TORCH_CHECK(
      normalizers.is_cpu() && normalizers.dim() == 4 && normalizers.size(0) == p.batch &&
          normalizers.size(1) == p.heads && normalizers.size(2) == p.length && normalizers.size(3) == 2 &&
          normalizers.scalar_type() == ScalarType::Float,
      "vq_attention_backward: normalizers must be (B, H, L, 2), float32");
  const auto empty = [&](int64_t heads, int64_t columns) {
    return torch::stable::new_empty(p.q, {p.batch, heads, p.length, columns}, p.q.scalar_type());
  };
  const auto absent = [&] { return torch::stable::new_empty(p.q, {0}, p.q.scalar_type()); };
  Tensor dq = empty(p.heads, p.near_depth), dk = empty(p.kv_heads, p.near_depth), dv = empty(p.kv_heads, p.values);
  Tensor dfar_q = p.has_far_q ? empty(p.heads, p.far_depth) : absent();
  Tensor dfar_k = p.has_far_q ? empty(p.kv_heads, p.far_depth) : absent();
  BiasGradients d_bias(p.pairs());
  if (p.empty()) {
    for (Tensor* gradient : {&dk, &dv, &dfar_k}) {  // there may be keys without a head of queries
      torch::stable::zero_(*gradient);
    }
  } else {
    const GradientTensors tensors{
        grad,
        out,
        normalizers,
        dq.mutable_data_ptr(),
        dk.mutable_data_ptr(),
        dv.mutable_data_ptr(),
        dfar_q.mutable_data_ptr(),
        dfar_k.mutable_data_ptr()};
    run(p, tensors, d_bias);
  }
  return {dq, dk, dv, bias_gradient(p, d_bias), dfar_q, dfar_k};
}

}  // namespace longvq
