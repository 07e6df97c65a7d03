// The dtype of a tensor, if the kernels take it. For files that are compiled once.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "dtype.h"

namespace longvq {

inline std::optional<ElementType> element_type(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return ElementType::kFloat;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    case ScalarType::Half:
      return ElementType::kHalf;
    default:
      return std::nullopt;
  }
}

}  // namespace longvq
