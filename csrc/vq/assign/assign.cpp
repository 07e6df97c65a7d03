#include "assign.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>

#include "../../common/check_tensor.h"
#include "../../common/cpu_capability.h"
#include "../../common/numbers.h"
#include "../../common/tensor_dtype.h"
#include "assign_kernel.h"
#include "few_keys.h"
#include "inputs.h"

namespace longvq {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBlockRows = 96;  // keys that share one pass over the codebook, see assign_block

LONGVQ_DEFINE_KERNEL_OF_THIS_CPU(AssignKernel, assign_kernel)

// The codebooks of all heads in the layout of AssignBlock.
struct PackedCodebook {
  int64_t codes;  // S, rounded up to whole registers
  AlignedArray<float> panels;
  AlignedArray<float> bias;
};

// -||C_s||^2 / 2, summed in double, as eight sums in a fixed order.
float half_square(const float* code, int64_t stride, int64_t head_dim) {
  double sums[8] = {};
  int64_t d = 0;
  for (; d + 8 <= head_dim; d += 8) {
    for (int64_t i = 0; i < 8; ++i) {
      const double value = code[(d + i) * stride];
      sums[i] += value * value;
    }
  }
  for (int64_t i = 0; d < head_dim; ++d, ++i) {
    const double value = code[d * stride];
    sums[i] += value * value;
  }
  double total = 0.0;
  for (const double sum : sums) {
    total += sum;
  }
  return static_cast<float>(-0.5 * total);
}

void pack_panel(
    const AssignCodebook& codebook, const AssignShape& shape, const AssignKernel& kernel, int64_t head,
    int64_t first_code, PackedCodebook& packed) {
  const int64_t width = std::min(kernel.panel, packed.codes - first_code);
  const int64_t present = std::min(width, shape.codes - first_code);
  const float* codes = codebook.data + head * codebook.head_stride + first_code * codebook.code_stride;
  float* panel = packed.panels.get() + (head * packed.codes + first_code) * shape.head_dim;
  float* bias = packed.bias.get() + head * packed.codes + first_code;
  for (int64_t j = 0; j < present; ++j) {
    bias[j] = half_square(codes + j * codebook.code_stride, codebook.dim_stride, shape.head_dim);
  }
  std::fill(bias + present, bias + width, -kInfinity);

  // Eight codes at a time, because all rows may map to the same set of an eight-way cache.
  constexpr int64_t kStreams = 8;
  for (int64_t j = 0; j < present; j += kStreams) {
    const int64_t streams = std::min(kStreams, present - j);
    for (int64_t d = 0; d < shape.head_dim; ++d) {
      const float* in = codes + j * codebook.code_stride + d * codebook.dim_stride;
      float* out = panel + d * width + j;
      if (streams == kStreams) {  // a constant number, which the compiler unrolls
        for (int64_t i = 0; i < kStreams; ++i) {
          out[i] = in[i * codebook.code_stride];
        }
      } else {
        for (int64_t i = 0; i < streams; ++i) {
          out[i] = in[i * codebook.code_stride];
        }
      }
    }
  }
  for (int64_t d = 0; d < shape.head_dim; ++d) {
    std::fill(panel + d * width + present, panel + (d + 1) * width, 0.0f);
  }
}

PackedCodebook pack_codebook(const AssignCodebook& codebook, const AssignShape& shape, const AssignKernel& kernel) {
  PackedCodebook packed;
  packed.codes = round_up(shape.codes, kernel.lanes);
  packed.panels = aligned_array<float>(shape.heads * packed.codes * shape.head_dim);
  packed.bias = aligned_array<float>(shape.heads * packed.codes);
  const int64_t panels_per_head = (packed.codes + kernel.panel - 1) / kernel.panel;
  const int64_t grain =
      std::max<int64_t>(1, kMinFlopsPerThread / 8 / std::max<int64_t>(1, kernel.panel * shape.head_dim));
  torch::stable::parallel_for(0, shape.heads * panels_per_head, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack_panel(codebook, shape, kernel, i / panels_per_head, i % panels_per_head * kernel.panel, packed);
    }
  });
  return packed;
}

// Buffers of a thread for one block of keys.
struct Scratch {
  AlignedArray<float> keys, best;
  AlignedArray<int32_t> best_code, out;
  bool finite[kBlockRows];

  Scratch(const AssignShape& shape, const AssignKernel& kernel)
      : keys(aligned_array<float>(round_up(kBlockRows, kernel.row_step) * shape.head_dim)),
        best(aligned_array<float>(round_up(kBlockRows, kernel.row_step) * kernel.lanes)),
        best_code(aligned_array<int32_t>(round_up(kBlockRows, kernel.row_step) * kernel.lanes)),
        out(aligned_array<int32_t>(kBlockRows)) {
    std::fill_n(keys.get(), round_up(kBlockRows, kernel.row_step) * shape.head_dim, 0.0f);
  }
};

// Keys first_row .. first_row + rows of one head. The block stays in the L2 cache. Each panel of the codebook is read
// once from memory and rows / row_step times from the L1 cache.
void assign_block(
    const AssignKeys& keys, const PackedCodebook& packed, const AssignShape& shape, const AssignKernel& kernel,
    int64_t head, int64_t first_row, int64_t rows, Scratch& scratch, int64_t* codes) {
  for (int64_t row = 0; row < rows; ++row) {
    scratch.finite[row] = keys.load(shape, head, first_row + row, scratch.keys.get() + row * shape.head_dim);
  }

  AssignBlock block;
  block.rows = rows;
  block.head_dim = shape.head_dim;
  block.codes = packed.codes;
  block.keys = scratch.keys.get();
  block.panels = packed.panels.get() + head * packed.codes * shape.head_dim;
  block.bias = packed.bias.get() + head * packed.codes;
  block.best = scratch.best.get();
  block.best_code = scratch.best_code.get();
  block.out = scratch.out.get();
  kernel.assign(block);

  for (int64_t row = 0; row < rows; ++row) {
    set_code(codes, shape, head, first_row + row, scratch.finite[row], block.out[row]);
  }
}

// The steps of all heads are distributed over the threads. A thread joins neighbouring steps into blocks.
void assign_many_keys(
    const AssignKeys& keys, const AssignCodebook& codebook, const AssignShape& shape, int64_t* codes) {
  const AssignKernel& kernel = kernel_of_this_cpu();
  const PackedCodebook packed = pack_codebook(codebook, shape, kernel);
  const int64_t rows = shape.rows();
  const int64_t steps_per_head = (rows + kernel.row_step - 1) / kernel.row_step;
  const int64_t steps_per_block = kBlockRows / kernel.row_step;
  const double flops_per_step = 2.0 * static_cast<double>(kernel.row_step) * static_cast<double>(packed.codes) *
                                static_cast<double>(std::max<int64_t>(shape.head_dim, 1));
  const int64_t grain = 1 + static_cast<int64_t>(kMinFlopsPerThread / flops_per_step);
  torch::stable::parallel_for(0, shape.heads * steps_per_head, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(shape, kernel);
    for (int64_t step = begin; step < end;) {
      const int64_t head = step / steps_per_head;
      const int64_t next = std::min({end, (head + 1) * steps_per_head, step + steps_per_block});
      const int64_t first_row = (step - head * steps_per_head) * kernel.row_step;
      const int64_t block_rows = std::min((next - step) * kernel.row_step, rows - first_row);
      assign_block(keys, packed, shape, kernel, head, first_row, block_rows, scratch, codes);
      step = next;
    }
  });
}

// The codebook in float32. A converted codebook is stored in `copy`.
AssignCodebook as_float(const Tensor& codebook, ElementType type, const AssignShape& shape, AlignedArray<float>& copy) {
  const void* data = codebook.const_data_ptr();
  if (type == ElementType::kFloat) {
    return {static_cast<const float*>(data), codebook.stride(0), codebook.stride(1), codebook.stride(2)};
  }
  copy = aligned_array<float>(shape.heads * shape.codes * shape.head_dim);
  for (int64_t i = 0; i < shape.heads * shape.codes; ++i) {
    const int64_t offset = i / shape.codes * codebook.stride(0) + i % shape.codes * codebook.stride(1);
    load_row(element_at(data, type, offset), type, codebook.stride(2), shape.head_dim, copy.get() + i * shape.head_dim);
  }
  return {copy.get(), shape.codes * shape.head_dim, shape.head_dim, 1};
}

}  // namespace

Tensor vq_assign_cpu(const Tensor& k, const Tensor& codebook) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(k.dim() == 4, "vq_assign: k must be (B, H, L, D), got ", k.dim(), " dimensions");
  STD_TORCH_CHECK(codebook.dim() == 3, "vq_assign: codebook must be (H, S, D), got ", codebook.dim(), " dimensions");
  STD_TORCH_CHECK(
      k.is_cpu() && codebook.is_cpu(), "vq_assign: k and codebook must be on the CPU, got ", tensor_text(k), " and ",
      tensor_text(codebook));
  const std::optional<ElementType> key_type = element_type(k), code_type = element_type(codebook);
  STD_TORCH_CHECK(
      key_type.has_value() && code_type.has_value(),
      "vq_assign: k and codebook must be float32, bfloat16 or float16 for the compiled CPU kernel, got ",
      dtype_name(k.scalar_type()), " and ", dtype_name(codebook.scalar_type()));
  const AssignShape shape{k.size(0), k.size(1), k.size(2), k.size(3), codebook.size(1)};
  STD_TORCH_CHECK(
      codebook.size(0) == shape.heads && codebook.size(2) == shape.head_dim,
      "vq_assign: codebook must be (H, S, D) = (", shape.heads, ", S, ", shape.head_dim, ") for this k, got (",
      codebook.size(0), ", ", shape.codes, ", ", codebook.size(2), ")");
  STD_TORCH_CHECK(shape.codes >= 1, "vq_assign: codebook must have at least one code, got S = 0");
  // The kernel keeps codes in 32-bit lanes.
  STD_TORCH_CHECK(
      shape.codes <= std::numeric_limits<int32_t>::max() - 1024,
      "vq_assign: codebook must have fewer than 2^31 - 1024 codes, got S = ", shape.codes);

  Tensor out = torch::stable::new_empty(k, {shape.batch, shape.heads, shape.length}, ScalarType::Long);
  if (shape.rows() == 0 || shape.heads == 0) {
    return out;
  }
  const AssignKeys keys{k.const_data_ptr(), *key_type, k.stride(0), k.stride(1), k.stride(2), k.stride(3)};
  AlignedArray<float> copy;
  const AssignCodebook codes = as_float(codebook, *code_type, shape, copy);
  const auto assign = shape.rows() <= kFewKeys ? assign_few_keys : assign_many_keys;
  assign(keys, codes, shape, static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace longvq
