#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "../share_out.h"
#include "attention.h"
#include "attention_gradient_head.h"

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
  share_out(p.pairs(), [&] { return GradientScratch(p); }, [&](int64_t item, GradientScratch& scratch) {
    GradientHead head(p, tensors, p.documents[item / p.kv_heads], item % p.kv_heads);
    head.run(scratch);
    d_bias[item] = std::move(head.d_bias);
  });
}

// Without a window blocks are independent but for the sums of gradients, of which each of a few parts has its own. How many doesn't depend on the threads, so neither does the result.
void run_everything_far(const Problem& p, const GradientTensors& tensors) {
  struct Part {
    int64_t pair, first, last;  // blocks
    std::unique_ptr<CodeGradients> codes;
  };
  std::vector<std::unique_ptr<GradientHead>> heads(p.pairs());
  share_out(p.pairs(), [] { return 0; }, [&](int64_t item, int) {
    heads[item] = std::make_unique<GradientHead>(p, tensors, p.documents[item / p.kv_heads], item % p.kv_heads);
  });
  constexpr int64_t kParts = 16;  // enough to share out evenly
  std::vector<Part> parts;
  std::vector<int64_t> first_part;
  for (int64_t pair = 0; pair < p.pairs(); ++pair) {
    first_part.push_back(static_cast<int64_t>(parts.size()));
    const int64_t length = heads[pair]->length;
    // No shorter than the codes are many: the sums take the memory of the values, at most.
    const int64_t wanted = std::max<int64_t>(1, std::min((kParts + p.pairs() - 1) / p.pairs(), length / p.num_codes));
    const int64_t blocks = (length + kBlock - 1) / kBlock, step = std::max<int64_t>(1, (blocks + wanted - 1) / wanted);
    for (int64_t first = 0; first < blocks; first += step) {
      parts.push_back({pair, first, std::min(first + step, blocks), nullptr});
    }
  }
  first_part.push_back(static_cast<int64_t>(parts.size()));
  share_out(static_cast<int64_t>(parts.size()), [&] { return GradientScratch(p); }, [&](int64_t item, auto& scratch) {
    Part& part = parts[item];
    GradientHead& head = *heads[part.pair];
    part.codes = std::make_unique<CodeGradients>(p);
    std::vector<float> row(p.depth);
    for (int64_t block = part.first; block < part.last; ++block) {
      head.attend(block, false, *part.codes, scratch, [&](int64_t g, int64_t i, const float* gradient) {
        for (int64_t d = 0; d < p.depth; ++d) {
          row[d] = head.unit(i) * gradient[d];
        }
        const int64_t place = p.place(head.document, head.kv_head * p.group + g, p.heads) + i;
        store_row(row.data(), p.depth, element_at(tensors.dq, p.type, place * p.depth), p.type, 1);
      });
    }
  });
  share_out(p.pairs(), [] { return 0; }, [&](int64_t pair, int) {
    const GradientHead& head = *heads[pair];
    GradientRows dk = head.rows_of(tensors.dk, head.kv_head, p.kv_heads, p.depth);
    GradientRows dv = head.rows_of(tensors.dv, head.kv_head, p.kv_heads, p.values);
    if (first_part[pair] < first_part[pair + 1]) {
      CodeGradients& codes = *parts[first_part[pair]].codes;
      for (int64_t i = first_part[pair] + 1; i < first_part[pair + 1]; ++i) {
        codes.add(p, *parts[i].codes);
      }
      head.take_far_values(0, head.length, codes, dv);
      if (p.cluster) {
        head.take_codewords(codes, dk);
      }
    }
    dk.finish();
    dv.finish();
  });
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
    const std::string& local_keys, const std::string& key_grad) {
  const Problem p(
      q, k, v, codebook, codes, bias, key_padding_mask, cu_seqlens, scale, causal, window, activation, local_keys,
      key_grad);
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
  if (!p.empty()) {
    const GradientTensors tensors{grad, out, normalizers, dq.mutable_data_ptr(), dk.mutable_data_ptr(), dv.mutable_data_ptr()};
    if (p.everything_far()) {
      run_everything_far(p, tensors);
    } else {
      run(p, tensors, d_bias);
    }
  }
  return {dq, dk, dv, bias_gradient(p, d_bias)};
}

}  // namespace longvq
