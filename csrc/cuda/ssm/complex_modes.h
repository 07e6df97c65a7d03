// Complex numbers, and the parameters of a mode as complex numbers.
#pragma once

#include "../common/device.h"
#include "params.h"

namespace longvq::cuda {

template <typename T>
struct Complex {
  T re, im;
};

// x · y + z
template <typename T>
LONGVQ_DEVICE Complex<T> multiply_add(Complex<T> x, Complex<T> y, Complex<T> z) {
  return {x.re * y.re - x.im * y.im + z.re, x.re * y.im + x.im * y.re + z.im};
}

// Number `index` of an array with one real number for each mode, or a pair for each complex mode.
template <typename T>
LONGVQ_DEVICE Complex<T> read_mode(const ScanModes& m, const float* array, int64_t index) {
  const float* from = array + index * (m.complex_modes ? 2 : 1);
  return {from[0], m.complex_modes ? from[1] : T{0}};
}

// The decay of a mode over a number of steps. The angle is in units of π, because sine and cosine of πx need no local
// memory.
LONGVQ_DEVICE Complex<double> decay_of(const ScanModes& m, int64_t channel, int64_t mode, double steps) {
  constexpr double kOneByPi = 0.31830988618379067154;
  const Complex<double> log_decay = read_mode<double>(m, m.log_decay, channel * m.modes + mode);
  const double size = exp(log_decay.re * steps), angle = log_decay.im * steps * kOneByPi;
  return {size * cosine_of_pi(angle), size * sine_of_pi(angle)};
}

template <typename T>
LONGVQ_DEVICE Complex<T> weight_of(const ScanModes& m, int64_t channel, int64_t mode) {
  return read_mode<T>(m, m.weight, channel * m.modes + mode);
}

}  // namespace longvq::cuda
