// Where the tables of a channel lie, in global as in shared memory.
#pragma once

#include <type_traits>

#include "../common/params.h"
#include "../common/tile.h"

namespace longvq::cuda {

// float16 goes in as float32 does: states are sums, which may leave its range.
template <typename Element>
using ScanOperand = std::conditional_t<std::is_same_v<Element, BFloat16>, OneBFloat16, ThreeParts>;

template <typename T>
struct Complex {
  T re, im;
};

// x · y + z
template <typename T>
LONGVQ_DEVICE Complex<T> multiply_add(Complex<T> x, Complex<T> y, Complex<T> z) {
  return {x.re * y.re - x.im * y.im + z.re, x.re * y.im + x.im * y.re + z.im};
}

// The decay of a mode over a number of steps. The angle in units of pi: its sine and cosine need no local memory.
LONGVQ_DEVICE Complex<double> decay_of(const ScanModes& m, int64_t channel, int64_t mode, double steps) {
  constexpr double kOneByPi = 0.31830988618379067154;
  const float* log_decay = m.log_decay + (channel * m.modes + mode) * (m.complex_modes ? 2 : 1);
  const double size = exp(log_decay[0] * steps), angle = m.complex_modes ? log_decay[1] * steps * kOneByPi : 0.0;
  return {size * cosine_of_pi(angle), size * sine_of_pi(angle)};
}

template <typename T>
LONGVQ_DEVICE Complex<T> weight_of(const ScanModes& m, int64_t channel, int64_t mode) {
  const float* weight = m.weight + (channel * m.modes + mode) * (m.complex_modes ? 2 : 1);
  return {weight[0], m.complex_modes ? weight[1] : T{0}};
}

template <int PARTS>
struct ScanLayout {
  using Inside = Tile<16, kScanSteps, PARTS>;           // K[column − row], of which 16 rows are all there is to know
  using Table = Tile<kScanSteps, kScanSteps, PARTS>;    // (steps, columns of a group) or the other way round
  using Chunks = Tile<kScanChunks, kScanSteps, PARTS>;  // inputs

  static_assert(2 * kScanGroup == kScanSteps, "tables are square");
  static_assert(Inside::kPitch == kScanSteps + 8 && Table::kPitch == kScanSteps + 8, "as scan_table_size counts");

  LONGVQ_DEVICE static Inside inside(uint16_t* tables) { return {tables}; }
  LONGVQ_DEVICE static Table in(uint16_t* tables, int group) {
    return {tables + (Inside::kBytes + 2 * group * Table::kBytes) / sizeof(uint16_t)};
  }
  LONGVQ_DEVICE static Table out(uint16_t* tables, int group) {
    return {tables + (Inside::kBytes + (2 * group + 1) * Table::kBytes) / sizeof(uint16_t)};
  }
  // Of gradients: 0 and 1 for inputs, the plain powers and those times their exponents; 2 and 3 for what comes back.
  LONGVQ_DEVICE static Table of_gradients(uint16_t* tables, int group, int which) {
    return {tables + (4 * group + which) * (Table::kBytes / sizeof(uint16_t))};
  }
};

}  // namespace longvq::cuda
