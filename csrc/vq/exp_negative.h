// exp for attention weights. For *_kernel.cpp files, see common/simd.h.
#pragma once

#include "../common/simd.h"

namespace longvq {
namespace {

// exp(x) for x <= 0 and slightly above, with an error of at most two units in the last place; 0 below -87, where the
// result would be subnormal.
inline Floats exp_negative(Floats x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: after adding it the low bits are the nearest integer
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
  const auto vanishes = x < -87.0f;
  x = vanishes ? Floats{} - 87.0f : x;
  const Floats shifted = x * kLog2e + kRound;
  const Floats k = shifted - kRound;
  const Floats r = (x - k * kLn2High) - k * kLn2Low;  // |r| <= ln 2 / 2
  Floats p = Floats{} + 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Words bits = reinterpret_cast<Words>(p) + (reinterpret_cast<Words>(shifted) << 23);  // p * 2^k
  return vanishes ? Floats{} : reinterpret_cast<Floats>(bits);
}

}  // namespace
}  // namespace longvq
