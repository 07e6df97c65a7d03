// The sequences of a call: the rows of a batch, or the documents that are packed into a single row.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "check_tensor.h"

namespace longvq {

// A sequence: positions start .. start + length of batch row `row`.
struct Document {
  int64_t row, start, length;
};

// Python checks cu_seqlens first, with better messages. Calls through torch.ops skip Python, so memory safety depends
// on these checks.
inline std::vector<Document> documents_of(
    const char* op, int64_t batch, int64_t length, const std::optional<torch::stable::Tensor>& cu_seqlens) {
  std::vector<Document> documents;
  if (!cu_seqlens.has_value()) {
    for (int64_t row = 0; row < batch; ++row) {
      documents.push_back({row, 0, length});
    }
    return documents;
  }
  STD_TORCH_CHECK(
      cu_seqlens->is_cpu() && cu_seqlens->dim() == 1 &&
          cu_seqlens->scalar_type() == torch::headeronly::ScalarType::Int && cu_seqlens->size(0) >= 1 && batch == 1,
      op, ": cu_seqlens must be (N + 1,) int32 on the CPU with a batch of 1, got ", tensor_text(*cu_seqlens),
      " with a batch of ", batch);
  const auto* offsets = static_cast<const int32_t*>(cu_seqlens->const_data_ptr());
  const int64_t count = cu_seqlens->size(0) - 1, stride = cu_seqlens->stride(0);
  STD_TORCH_CHECK(
      offsets[0] == 0 && offsets[count * stride] == length, op,
      ": cu_seqlens must start with 0 and end with L = ", length, ", got ", offsets[0], " and ",
      offsets[count * stride]);
  for (int64_t n = 0; n < count; ++n) {
    const int64_t start = offsets[n * stride], end = offsets[(n + 1) * stride];
    STD_TORCH_CHECK(start <= end, op, ": cu_seqlens must not decrease, got ", start, " and then ", end);
    documents.push_back({0, start, end - start});
  }
  return documents;
}

}  // namespace longvq
