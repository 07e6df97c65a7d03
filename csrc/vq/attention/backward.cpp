#include <torch/csrc/stable/ops.h>

#include "../../common/check_tensor.h"
#include "attention.h"
#include "backward_ranges.h"
#include "parallel_heads.h"

namespace longvq {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* kOp = "vq_attention_backward";

// Gradients of the bias from each document and key-value head, by query head of the group.
using BiasGradients = std::vector<std::vector<std::vector<double>>>;

void run(const AttentionCall& call, const BackwardTensors& tensors, BiasGradients& d_bias) {
  const Codebooks codebooks(call, true);
  for_each_work_item(
      call, [&](int64_t length) { return BackwardRanges::count_ranges(call, length); },
      [&](const Document& document, int64_t kv_head) {
        return std::make_unique<BackwardRanges>(call, codebooks, tensors, document, kv_head);
      },
      [&] { return BackwardScratch(call); },
      [](BackwardRanges& ranges, int64_t range, BackwardScratch& scratch) { ranges.run(range, scratch); },
      [&](int64_t pair, BackwardRanges& ranges) { d_bias[pair] = ranges.join(); });
}

Tensor bias_gradient(const AttentionCall& call, const BiasGradients& d_bias) {
  if (!call.bias.has_value()) {
    return torch::stable::new_empty(call.q, {0}, call.q.scalar_type());
  }
  const int64_t columns = call.bias->size(1);
  std::vector<double> sums(call.heads * columns, 0.0);
  for (int64_t item = 0; item < static_cast<int64_t>(d_bias.size()); ++item) {
    for (int64_t g = 0; g < static_cast<int64_t>(d_bias[item].size()); ++g) {
      const std::vector<double>& d_bias_of_head = d_bias[item][g];
      const int64_t head = item % call.kv_heads * call.group + g;
      for (int64_t i = 0; i < call.bias_columns(); ++i) {
        sums[head * columns + bias_column(call, i)] += d_bias_of_head[i];
      }
    }
  }
  Tensor result = torch::stable::new_empty(*call.bias, {call.heads, columns}, ScalarType::Float);
  std::copy(sums.begin(), sums.end(), static_cast<float*>(result.mutable_data_ptr()));
  return result;
}

}  // namespace

AttentionGradientTensors vq_attention_backward_cpu(
    const Tensor& grad, const Tensor& out, const Tensor& normalizers, const AttentionInputs& inputs,
    const AttentionOptions& options) {
  const AttentionCall call(inputs, options);
  for (const auto& [name, x] : {std::pair{"grad", &grad}, std::pair{"out", &out}}) {
    const ScalarType dtype = call.v.scalar_type();
    check_tensor(kOp, name, *x, dtype, "(B, H, L, E)", {call.batch, call.heads, call.length, call.value_dim});
  }
  check_tensor(
      kOp, "normalizers", normalizers, ScalarType::Float, "(B, H, L, 2)", {call.batch, call.heads, call.length, 2});
  const auto empty = [&](int64_t heads, int64_t columns) {
    return torch::stable::new_empty(call.q, {call.batch, heads, call.length, columns}, call.q.scalar_type());
  };
  const auto absent = [&] { return torch::stable::new_empty(call.q, {0}, call.q.scalar_type()); };
  Tensor dq = empty(call.heads, call.head_dim), dk = empty(call.kv_heads, call.head_dim),
         dv = empty(call.kv_heads, call.value_dim);
  Tensor dfar_q = call.has_far_q ? empty(call.heads, call.far_head_dim) : absent();
  Tensor dfar_k = call.has_far_q ? empty(call.kv_heads, call.far_head_dim) : absent();
  BiasGradients d_bias(call.pairs());
  if (call.empty()) {
    for (Tensor* gradient : {&dk, &dv, &dfar_k}) {  // there may be keys without query heads
      torch::stable::zero_(*gradient);
    }
  } else {
    const BackwardTensors tensors{
        grad,
        out,
        normalizers,
        dq.mutable_data_ptr(),
        dk.mutable_data_ptr(),
        dv.mutable_data_ptr(),
        dfar_q.mutable_data_ptr(),
        dfar_k.mutable_data_ptr()};
    run(call, tensors, d_bias);
  }
  return {dq, dk, dv, bias_gradient(call, d_bias), dfar_q, dfar_k};
}

}  // namespace longvq
