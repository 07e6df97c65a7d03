// exp and sincos of vectors of doubles, with errors of about one unit in the last place. For scan_kernel.cpp only.
#pragma once

#include <cmath>

#include "../../common/simd.h"

namespace longvq {
namespace {

constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: after adding it the low bits are the nearest integer

inline Doubles broadcast(double value) {
  return Doubles{} + value;
}

// exp(x) for x <= 0; 0 below -708, where the result would be subnormal.
inline Doubles exp_negative(Doubles x) {
  constexpr double kLog2e = 1.4426950408889634;
  constexpr double kLn2High = 0.693147180369123816490, kLn2Low = 1.90821492927058770002e-10;
  const Longs vanishes = x < -708.0;
  x = vanishes ? broadcast(-708.0) : x;
  const Doubles shifted = x * kLog2e + kRound;
  const Doubles k = shifted - kRound;
  const Doubles r = (x - k * kLn2High) - k * kLn2Low;  // |r| <= ln 2 / 2
  Doubles p = broadcast(1.0 / 6227020800.0);           // Taylor series to r^13; the remainder is below 1e-17
  constexpr double kInverseFactorial[] = {
      1.0 / 479001600.0,
      1.0 / 39916800.0,
      1.0 / 3628800.0,
      1.0 / 362880.0,
      1.0 / 40320.0,
      1.0 / 5040.0,
      1.0 / 720.0,
      1.0 / 120.0,
      1.0 / 24.0,
      1.0 / 6.0,
      0.5,
      1.0,
      1.0};
  for (const double coefficient : kInverseFactorial) {
    p = p * r + coefficient;
  }
  const Longs bits = reinterpret_cast<Longs>(p) + (reinterpret_cast<Longs>(shifted) << 52);  // p * 2^k
  return vanishes ? broadcast(0.0) : reinterpret_cast<Doubles>(bits);
}

inline void sincos(Doubles x, Doubles& sine, Doubles& cosine) {
  constexpr double kLargest = 1e5;  // up to this value k * kHalfPi1 and k * kHalfPi2 are exact
  const Longs large = (x > kLargest) | (x < -kLargest) | (x != x);
  bool any = false;
  for (int i = 0; i < kHalf; ++i) {
    any |= large[i] != 0;
  }
  if (any) {
    for (int i = 0; i < kHalf; ++i) {
      sine[i] = std::sin(x[i]);
      cosine[i] = std::cos(x[i]);
    }
    return;
  }
  constexpr double kTwoOverPi = 0.63661977236758134308;
  // pi / 2 as a sum of three terms; the first two have 33 bits
  constexpr double kHalfPi1 = 1.57079632673412561417e+00, kHalfPi2 = 6.07710050630396597660e-11;
  constexpr double kHalfPi3 = 2.02226624879595063154e-21;
  const Doubles shifted = x * kTwoOverPi + kRound;
  const Doubles k = shifted - kRound;
  const Doubles r = ((x - k * kHalfPi1) - k * kHalfPi2) - k * kHalfPi3;  // |r| <= pi / 4
  const Doubles r2 = r * r;
  // Taylor series to r^17 and r^16; the remainders are below 1e-17
  constexpr double kSine[] = {-1.0 / 1307674368000.0, 1.0 / 6227020800.0, -1.0 / 39916800.0, 1.0 / 362880.0,
                              -1.0 / 5040.0,          1.0 / 120.0,        -1.0 / 6.0};
  constexpr double kCosine[] = {
      -1.0 / 87178291200.0, 1.0 / 479001600.0, -1.0 / 3628800.0, 1.0 / 40320.0, -1.0 / 720.0, 1.0 / 24.0, -0.5};
  Doubles s = broadcast(1.0 / 355687428096000.0), c = broadcast(1.0 / 20922789888000.0);
  for (const double coefficient : kSine) {
    s = s * r2 + coefficient;
  }
  for (const double coefficient : kCosine) {
    c = c * r2 + coefficient;
  }
  s = r + r * r2 * s;
  c = c * r2 + 1.0;
  const Longs quadrant = reinterpret_cast<Longs>(shifted);
  const Longs odd = -(quadrant & 1), minus_sine = (quadrant & 2) << 62, minus_cosine = ((quadrant + 1) & 2) << 62;
  sine = reinterpret_cast<Doubles>(reinterpret_cast<Longs>(odd ? c : s) ^ minus_sine);
  cosine = reinterpret_cast<Doubles>(reinterpret_cast<Longs>(odd ? s : c) ^ minus_cosine);
}

}  // namespace
}  // namespace longvq
