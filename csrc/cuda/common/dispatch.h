// From sizes and types known at run time to those a kernel was compiled for.
#pragma once

#include <type_traits>

#include "dtypes.h"
#include "params.h"

namespace longvq::cuda {

template <int VALUE>
using Constant = std::integral_constant<int, VALUE>;

// call(an element of that type)
template <typename Call>
int for_element(ElementType type, const Call& call) {
  switch (type) {
    case ElementType::kFloat:
      return call(float{});
    case ElementType::kBFloat16:
      return call(BFloat16{});
    case ElementType::kHalf:
      return call(Half{});
  }
  return kNotCovered;
}

// call(Constant<columns>) with enough columns.
template <typename Call>
int for_depth(int64_t depth, const Call& call) {
  if (depth > kMaxDepth) {
    return kNotCovered;
  }
  switch (padded_depth(depth)) {
    case 64:
      return call(Constant<64>{});
    case 128:
      return call(Constant<128>{});
    default:
      return call(Constant<256>{});
  }
}

// Whether all rows of these 16-bit numbers begin at multiples of 16 bytes.
inline bool aligned(const void* data, ElementType type, std::initializer_list<int64_t> strides) {
  bool so = type != ElementType::kFloat && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int64_t stride : strides) {
    so = so && stride % 8 == 0;
  }
  return so;
}

// A grid has so many blocks along y and z.
constexpr int64_t kMaxGrid = 65535;

constexpr int64_t divide_up(int64_t x, int64_t unit) {
  return (x + unit - 1) / unit;
}

}  // namespace longvq::cuda
