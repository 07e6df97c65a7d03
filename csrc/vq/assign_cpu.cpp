#include "assign.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "../aligned.h"
#include "../cpu_capability.h"
#include "assign_kernel.h"

namespace longvq {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBlockRows = 96;              // keys that go over the codebook together, see assign_block
constexpr int64_t kMinFlopsPerThread = 1 << 20;  // below this starting a thread costs more than it saves

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

LONGVQ_DEFINE_KERNEL_OF_THIS_CPU(AssignKernel, assign_kernel)

struct Shape {
  int64_t batch, heads, length, depth, codes;
};

// Strides in elements.
struct Keys {
  const float* data;
  int64_t batch_stride, head_stride, length_stride, depth_stride;
};

struct Codebook {
  const float* data;
  int64_t head_stride, code_stride, depth_stride;
};

// The codebook as AssignBlock wants it, for every head.
struct PackedCodebook {
  int64_t codes;  // rounded up to whole SIMD registers
  AlignedArray<float> panels;
  AlignedArray<float> bias;
};

// -||C_s||^2 / 2, summed in double: eight independent chains, always in this order.
float half_square(const float* code, int64_t stride, int64_t depth) {
  double sums[8] = {};
  int64_t d = 0;
  for (; d + 8 <= depth; d += 8) {
    for (int64_t i = 0; i < 8; ++i) {
      const double value = code[(d + i) * stride];
      sums[i] += value * value;
    }
  }
  for (int64_t i = 0; d < depth; ++d, ++i) {
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
    const Codebook& codebook, const Shape& shape, const AssignKernel& kernel, int64_t head, int64_t first_code,
    PackedCodebook& packed) {
  const int64_t width = std::min(kernel.panel, packed.codes - first_code);
  const int64_t present = std::min(width, shape.codes - first_code);
  const float* codes = codebook.data + head * codebook.head_stride + first_code * codebook.code_stride;
  float* panel = packed.panels.get() + (head * packed.codes + first_code) * shape.depth;
  float* bias = packed.bias.get() + head * packed.codes + first_code;
  for (int64_t j = 0; j < present; ++j) {
    bias[j] = half_square(codes + j * codebook.code_stride, codebook.depth_stride, shape.depth);
  }
  std::fill(bias + present, bias + width, -std::numeric_limits<float>::infinity());

  // Few codes at a time: their rows may all fall into the same set of an eight-way cache.
  constexpr int64_t kStreams = 8;
  for (int64_t j = 0; j < present; j += kStreams) {
    const int64_t streams = std::min(kStreams, present - j);
    for (int64_t d = 0; d < shape.depth; ++d) {
      const float* in = codes + j * codebook.code_stride + d * codebook.depth_stride;
      float* out = panel + d * width + j;
      if (streams == kStreams) {  // a constant count, which the compiler unrolls
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
  for (int64_t d = 0; d < shape.depth; ++d) {
    std::fill(panel + d * width + present, panel + (d + 1) * width, 0.0f);
  }
}

PackedCodebook pack_codebook(const Codebook& codebook, const Shape& shape, const AssignKernel& kernel) {
  PackedCodebook packed;
  packed.codes = round_up(shape.codes, kernel.lanes);
  packed.panels = aligned_array<float>(shape.heads * packed.codes * shape.depth);
  packed.bias = aligned_array<float>(shape.heads * packed.codes);
  const int64_t panels_per_head = (packed.codes + kernel.panel - 1) / kernel.panel;
  const int64_t grain = std::max<int64_t>(1, kMinFlopsPerThread / 8 / std::max<int64_t>(1, kernel.panel * shape.depth));
  torch::stable::parallel_for(0, shape.heads * panels_per_head, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack_panel(codebook, shape, kernel, i / panels_per_head, i % panels_per_head * kernel.panel, packed);
    }
  });
  return packed;
}

// Copies one key and returns whether all of it is finite.
bool copy_key(const float* key, int64_t stride, int64_t depth, float* out) {
  constexpr uint32_t kExponent = 0x7f800000u;
  uint32_t not_finite = 0;
  if (stride == 1) {
    std::memcpy(out, key, static_cast<std::size_t>(depth) * sizeof(float));
  } else {
    for (int64_t d = 0; d < depth; ++d) {
      out[d] = key[d * stride];
    }
  }
  for (int64_t d = 0; d < depth; ++d) {
    uint32_t bits;
    std::memcpy(&bits, out + d, sizeof bits);
    not_finite |= (bits & kExponent) == kExponent;
  }
  return not_finite == 0;
}

// Per thread: a block's keys, packed, and what the kernel needs for them.
struct Scratch {
  AlignedArray<float> keys, best;
  AlignedArray<int32_t> best_code, out;
  bool finite[kBlockRows];

  Scratch(const Shape& shape, const AssignKernel& kernel)
      : keys(aligned_array<float>(round_up(kBlockRows, kernel.row_step) * shape.depth)),
        best(aligned_array<float>(round_up(kBlockRows, kernel.row_step) * kernel.lanes)),
        best_code(aligned_array<int32_t>(round_up(kBlockRows, kernel.row_step) * kernel.lanes)),
        out(aligned_array<int32_t>(kBlockRows)) {
    std::fill_n(keys.get(), round_up(kBlockRows, kernel.row_step) * shape.depth, 0.0f);
  }
};

// Keys first_row .. first_row + rows of one head, rows counted over batch and length. Together they stay in the L2
// cache while each panel of the codebook is read from memory once and from the L1 cache rows / row_step times.
void assign_block(
    const Keys& keys, const PackedCodebook& packed, const Shape& shape, const AssignKernel& kernel, int64_t head,
    int64_t first_row, int64_t rows, Scratch& scratch, int64_t* out) {
  int64_t batch = first_row / shape.length;
  int64_t position = first_row % shape.length;
  const auto advance = [&] {
    if (++position == shape.length) {
      position = 0;
      ++batch;
    }
  };
  for (int64_t row = 0; row < rows; ++row, advance()) {
    const float* key =
        keys.data + batch * keys.batch_stride + head * keys.head_stride + position * keys.length_stride;
    scratch.finite[row] = copy_key(key, keys.depth_stride, shape.depth, scratch.keys.get() + row * shape.depth);
  }

  AssignBlock block;
  block.rows = rows;
  block.depth = shape.depth;
  block.codes = packed.codes;
  block.keys = scratch.keys.get();
  block.panels = packed.panels.get() + head * packed.codes * shape.depth;
  block.bias = packed.bias.get() + head * packed.codes;
  block.best = scratch.best.get();
  block.best_code = scratch.best_code.get();
  block.out = scratch.out.get();
  kernel.assign(block);

  batch = first_row / shape.length;
  position = first_row % shape.length;
  for (int64_t row = 0; row < rows; ++row, advance()) {
    // A key that is not finite has no nearest code; code 0 is at least one that exists.
    out[(batch * shape.heads + head) * shape.length + position] = scratch.finite[row] ? block.out[row] : 0;
  }
}

}  // namespace

Tensor vq_assign_cpu(const Tensor& k, const Tensor& codebook) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(k.dim() == 4, "vq_assign: k must be (B, H, L, D), got ", k.dim(), " dimensions");
  STD_TORCH_CHECK(codebook.dim() == 3, "vq_assign: codebook must be (H, S, D), got ", codebook.dim(), " dimensions");
  STD_TORCH_CHECK(k.is_cpu() && codebook.is_cpu(), "vq_assign: k and codebook must both be on the CPU");
  STD_TORCH_CHECK(
      k.scalar_type() == ScalarType::Float && codebook.scalar_type() == ScalarType::Float,
      "vq_assign: the compiled CPU kernel takes float32 for k and codebook");
  const Shape shape{k.size(0), k.size(1), k.size(2), k.size(3), codebook.size(1)};
  STD_TORCH_CHECK(
      codebook.size(0) == shape.heads && codebook.size(2) == shape.depth, "vq_assign: codebook must be (H, S, D) = (",
      shape.heads, ", S, ", shape.depth, ") for this k, got (", codebook.size(0), ", ", shape.codes, ", ",
      codebook.size(2), ")");
  STD_TORCH_CHECK(shape.codes >= 1, "vq_assign: codebook must hold at least one code, got S = 0");
  // Code indices travel through the kernel as 32-bit SIMD lanes.
  STD_TORCH_CHECK(
      shape.codes <= std::numeric_limits<int32_t>::max() - 1024, "vq_assign: too many codes, S = ", shape.codes);

  Tensor out = torch::stable::new_empty(k, {shape.batch, shape.heads, shape.length}, ScalarType::Long);
  const int64_t rows = shape.batch * shape.length;  // keys of one head
  if (rows == 0 || shape.heads == 0) {
    return out;
  }

  const AssignKernel& kernel = kernel_of_this_cpu();
  const Keys keys{
      static_cast<const float*>(k.const_data_ptr()), k.stride(0), k.stride(1), k.stride(2), k.stride(3)};
  const PackedCodebook packed = pack_codebook(
      {static_cast<const float*>(codebook.const_data_ptr()), codebook.stride(0), codebook.stride(1),
       codebook.stride(2)},
      shape, kernel);
  int64_t* codes = static_cast<int64_t*>(out.mutable_data_ptr());

  // Threads share out the steps of all heads; each joins its own neighbouring steps into blocks.
  const int64_t steps_per_head = (rows + kernel.row_step - 1) / kernel.row_step;
  const int64_t steps_per_block = kBlockRows / kernel.row_step;
  const double flops_per_step = 2.0 * static_cast<double>(kernel.row_step) * static_cast<double>(packed.codes) *
                                static_cast<double>(std::max<int64_t>(shape.depth, 1));
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
  return out;
}

}  // namespace longvq
