// Small numbers that kernels and their callers need. For *_kernel.cpp files too, see simd.h.
#pragma once

#include <cstdint>

namespace longvq {
namespace {

constexpr float kInfinity = __builtin_inff();

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace
}  // namespace longvq
