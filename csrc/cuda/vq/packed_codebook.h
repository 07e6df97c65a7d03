// A codebook packed for tensor cores, as a tensor that keeps its memory.
#pragma once

#include "../tensors.h"
#include "params.h"

namespace longvq::cuda {

struct PackedCodebook {
  Tensor terms, half_norms;
  Codebook codebook;  // points to both

  // From (H, S, D), with the columns padded to `columns`. kFloat: in three bfloat16 terms.
  PackedCodebook(const char* op, const Tensor& from, ElementType type, int64_t columns, void* stream);
};

}  // namespace longvq::cuda
