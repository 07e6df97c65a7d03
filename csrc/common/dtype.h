// The dtypes of inputs that all kernels take.
#pragma once

#include <cstdint>

namespace longvq {

enum class ElementType : int32_t { kFloat, kBFloat16, kHalf };

constexpr int64_t element_size(ElementType type) {
  return type == ElementType::kFloat ? 4 : 2;
}

}  // namespace longvq
