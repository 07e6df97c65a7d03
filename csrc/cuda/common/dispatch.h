// Chooses the compiled kernel for sizes and dtypes known only at run time.
#pragma once

#include <type_traits>

#include "../../common/dtype.h"
#include "dtypes.h"
#include "status.h"

namespace longvq::cuda {

template <int VALUE>
using Constant = std::integral_constant<int, VALUE>;

// Returns call(an element of that dtype).
template <typename Call>
int for_dtype(ElementType type, const Call& call) {
  switch (type) {
    case ElementType::kFloat:
      return call(float{});
    case ElementType::kBFloat16:
      return call(BFloat16{});
    case ElementType::kHalf:
      return call(Half{});
  }
  return kUnsupported;
}

// Returns call(Constant<columns>) with the least of 64, 128 and 256 columns, up to MOST, that holds `columns`.
template <int MOST, typename Call>
int for_padded_columns(int64_t columns, const Call& call) {
  if (columns <= 64) {
    return call(Constant<64>{});
  }
  if (columns <= 128) {
    return call(Constant<128>{});
  }
  if constexpr (MOST == 256) {
    if (columns <= 256) {
      return call(Constant<256>{});
    }
  }
  return kUnsupported;
}

// The most blocks of a grid along y and z.
constexpr int64_t kMaxGrid = 65535;

constexpr int64_t divide_up(int64_t x, int64_t unit) {
  return (x + unit - 1) / unit;
}

}  // namespace longvq::cuda
