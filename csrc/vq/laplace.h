// Mega's attention function laplace(x) = (1 + erf((x - mu) / (sigma sqrt 2))) / 2 with mu = sqrt(1/2) and sigma =
// sqrt(1 / (4 pi)). For *_kernel.cpp files too, see common/simd.h. This file includes nothing, because the CUDA kernels
// take the constants from here. They have a function of their own, for the device.
#pragma once

namespace longvq {
namespace {

constexpr float kLaplaceMean = 0.70710678f;          // mu
constexpr float kLaplaceInverseWidth = 2.50662827f;  // 1 / (sigma sqrt 2) = sqrt(2 pi)
constexpr float kLaplacePeak = 1.41421356f;          // the derivative at mu, 1 / (sigma sqrt(2 pi)) = sqrt 2

inline float laplace(float x) {
  return 0.5f * __builtin_erfcf((kLaplaceMean - x) * kLaplaceInverseWidth);
}

}  // namespace
}  // namespace longvq
