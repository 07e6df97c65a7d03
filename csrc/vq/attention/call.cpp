#include "call.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "../../common/cpu_capability.h"
#include "../../common/tensor_dtype.h"

namespace longvq {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* kOp = "vq_attention";

LONGVQ_DEFINE_KERNEL_OF_THIS_CPU(AttentionKernel, attention_kernel)

ElementType type_of(const Tensor& q) {
  const std::optional<ElementType> type = element_type(q);
  STD_TORCH_CHECK(
      type.has_value(), "vq_attention: the compiled CPU kernel takes q, k and v in float32, bfloat16 or float16");
  return *type;
}

}  // namespace

Problem::Problem(const AttentionInputs& in, const AttentionOptions& options)
    : q(in.q), k(in.k), v(in.v), codebook(in.codebook), codes(in.codes), far_q(in.far_q ? *in.far_q : in.q),
      bias(in.bias), mask(in.key_padding_mask), type(type_of(in.q)), scale(options.scale), causal(options.causal),
      window(options.window), activation(options.activation), exact(options.uses_exact_keys()),
      cluster(options.key_grad == KeyGrad::kCluster), has_far_q(in.far_q.has_value()), kernel(kernel_of_this_cpu()) {
  STD_TORCH_CHECK(
      in.far_k.has_value() == has_far_q && (!has_far_q || options.local_keys == LocalKeys::kExact), kOp,
      ": far_q and far_k must be given together, with exact local_keys");
  const Tensor& far_k = has_far_q ? *in.far_k : k;
  for (const Tensor* x : {&q, &k, &v, &far_q, &far_k}) {
    STD_TORCH_CHECK(
        x->is_cpu() && x->dim() == 4 && x->scalar_type() == q.scalar_type(), kOp,
        ": q, k, v, far_q and far_k must have four dimensions and one dtype");
  }
  STD_TORCH_CHECK(
      codebook.is_cpu() && codebook.dim() == 3 && codebook.scalar_type() == ScalarType::Float, kOp,
      ": codebook must be (Hkv, S, D), float32");
  batch = q.size(0), heads = q.size(1), length = q.size(2), near_depth = q.size(3), far_depth = far_q.size(3);
  kv_heads = k.size(1), values = v.size(3), num_codes = codebook.size(1);
  STD_TORCH_CHECK(
      kv_heads >= 1 && heads % kv_heads == 0 && near_depth >= 1 && far_depth >= 1 && values >= 1 && num_codes >= 1, kOp,
      ": wrong sizes");
  const auto has_sizes = [&](const Tensor& x, int64_t of_heads, int64_t columns) {
    return x.size(0) == batch && x.size(1) == of_heads && x.size(2) == length && x.size(3) == columns;
  };
  STD_TORCH_CHECK(
      has_sizes(k, kv_heads, near_depth) && has_sizes(v, kv_heads, values) && has_sizes(far_q, heads, far_depth) &&
          has_sizes(far_k, kv_heads, far_depth) && codebook.size(0) == kv_heads && codebook.size(2) == far_depth,
      kOp, ": shapes of q, k, v, codebook, far_q and far_k do not fit each other");
  STD_TORCH_CHECK(
      codes.is_cpu() && codes.dim() == 3 && codes.scalar_type() == ScalarType::Long && codes.size(0) == batch &&
          codes.size(1) == kv_heads && codes.size(2) == length,
      "vq_attention: codes must be (B, Hkv, L), int64");
  STD_TORCH_CHECK(
      !bias.has_value() ||
          (bias->is_cpu() && bias->dim() == 2 && bias->scalar_type() == ScalarType::Float && bias->size(0) == heads &&
           (window == 0 || bias->size(1) == (causal ? window : 2 * window - 1))),
      "vq_attention: bias must be (H, W) or (H, 2W - 1), float32");
  STD_TORCH_CHECK(
      !mask.has_value() || (mask->is_cpu() && mask->dim() == 2 && mask->size(0) == batch && mask->size(1) == length &&
                            mask->scalar_type() == ScalarType::Bool),
      "vq_attention: key_padding_mask must be (B, L), bool");
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t head = 0; head < kv_heads; ++head) {
      const auto* of =
          static_cast<const int64_t*>(codes.const_data_ptr()) + row * codes.stride(0) + head * codes.stride(1);
      for (int64_t i = 0; i < length; ++i) {
        const int64_t code = of[i * codes.stride(2)];
        STD_TORCH_CHECK(code >= 0 && code < num_codes, "vq_attention: codes must lie in [0, S), got ", code);
      }
    }
  }
  documents = documents_of(kOp, batch, length, in.cu_seqlens);
  window = std::min(window, length);  // a wider window sees no more
  group = heads / kv_heads;
  reach = std::max<int64_t>(window - 1, 0);
  far_columns = round_up(num_codes, kernel.lanes);
  value_columns = round_up(values, kernel.lanes);
  near_depth_columns = round_up(near_depth, kernel.lanes);
  far_depth_columns = round_up(far_depth, kernel.lanes);
}

Keys::Keys(const Problem& p, const Document& document, int64_t head)
    : k(p.matrix_of(p.k, document, head)), v(p.matrix_of(p.v, document, head)), codebook(codebook_of(p, head)),
      codes(
          static_cast<const int64_t*>(p.codes.const_data_ptr()) + document.row * p.codes.stride(0) +
          head * p.codes.stride(1) + document.start * p.codes.stride(2)),
      code_stride(p.codes.stride(2)), masked(nullptr), mask_stride(0) {
  if (p.mask.has_value()) {
    mask_stride = p.mask->stride(1);
    masked = static_cast<const bool*>(p.mask->const_data_ptr()) + document.row * p.mask->stride(0) +
             document.start * mask_stride;
  }
}

Matrix codebook_of(const Problem& p, int64_t head) {
  const float* data = static_cast<const float*>(p.codebook.const_data_ptr()) + head * p.codebook.stride(0);
  return {
      reinterpret_cast<const char*>(data), p.codebook.stride(1), p.codebook.stride(2), p.far_depth,
      ElementType::kFloat};
}

int64_t bias_column(const Problem& p, int64_t i) {
  // Of a bidirectional window wider than the sequence the middle is left.
  return p.causal ? p.window - 1 - i : i + (p.bias->size(1) + 1) / 2 - p.window;
}

std::vector<float> bias_of(const Problem& p, int64_t head) {
  std::vector<float> values;
  if (p.bias.has_value() && p.window > 0) {
    values.assign(2 * p.window - 1, 0.0f);
    const float* data = static_cast<const float*>(p.bias->const_data_ptr()) + head * p.bias->stride(0);
    for (int64_t i = 0; i < p.bias_columns(); ++i) {
      values[i] = data[bias_column(p, i) * p.bias->stride(1)];
    }
  }
  return values;
}

std::vector<float> units_of(const Problem& p, const Document& document, const Keys& keys) {
  std::vector<float> units;
  if (p.activation == Activation::kLaplace) {
    int64_t count = 0;
    for (int64_t i = 0; i < document.length; ++i) {
      count += !keys.ignored(i);
      units.push_back(1.0f / static_cast<float>(std::max<int64_t>(count, 1)));
    }
    if (!p.causal && !units.empty()) {
      std::fill(units.begin(), units.end(), units.back());
    }
  }
  return units;
}

}  // namespace longvq
