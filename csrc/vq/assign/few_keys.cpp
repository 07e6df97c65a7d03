#include "few_keys.h"

#include <torch/csrc/stable/ops.h>

#include "../../common/cpu_capability.h"

namespace longvq {
namespace {

LONGVQ_DEFINE_KERNEL_OF_THIS_CPU(AssignFewKernel, assign_few_kernel)

// Copies the codewords of a head to rows of `width` floats, padded with zeros.
void copy_codes(
    const AssignCodebook& codebook, int64_t head, int64_t codes, int64_t head_dim, int64_t width, float* out) {
  const float* in = codebook.data + head * codebook.head_stride;
  for (int64_t s = 0; s < codes; ++s) {
    load_row(in + s * codebook.code_stride, ElementType::kFloat, codebook.dim_stride, head_dim, out + s * width);
    std::fill(out + s * width + head_dim, out + (s + 1) * width, 0.0f);
  }
}

}  // namespace

void assign_few_keys(const AssignKeys& keys, const AssignCodebook& codebook, const AssignShape& shape, int64_t* codes) {
  const AssignFewKernel& kernel = kernel_of_this_cpu();
  const int64_t rows = shape.rows(), width = (shape.head_dim + kernel.lanes - 1) / kernel.lanes * kernel.lanes;
  const bool in_place = codebook.dim_stride == 1 && width == shape.head_dim;
  const double flops_per_head =
      2.0 * static_cast<double>(rows + 1) * static_cast<double>(shape.codes) * static_cast<double>(width);
  const int64_t grain = 1 + static_cast<int64_t>(kMinFlopsPerThread / (flops_per_head + 1.0));
  torch::stable::parallel_for(0, shape.heads, grain, [&](int64_t begin, int64_t end) {
    const AlignedArray<float> head_keys = aligned_array<float>(rows * width);
    const AlignedArray<float> copy = aligned_array<float>(in_place ? 0 : shape.codes * width);
    int32_t out[kFewKeys];
    bool finite[kFewKeys];
    std::fill_n(head_keys.get(), rows * width, 0.0f);
    for (int64_t head = begin; head < end; ++head) {
      for (int64_t row = 0; row < rows; ++row) {
        finite[row] = keys.load(shape, head, row, head_keys.get() + row * width);
      }
      if (!in_place) {
        copy_codes(codebook, head, shape.codes, shape.head_dim, width, copy.get());
      }
      const float* codewords = in_place ? codebook.data + head * codebook.head_stride : copy.get();
      const int64_t code_stride = in_place ? codebook.code_stride : width;
      kernel.assign({rows, shape.codes, width, head_keys.get(), codewords, code_stride, out});
      for (int64_t row = 0; row < rows; ++row) {
        set_code(codes, shape, head, row, finite[row], out[row]);
      }
    }
  });
}

}  // namespace longvq
