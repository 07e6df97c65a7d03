// The functions of common/device.h on the host. Fragments have the layouts of the PTX manual (mma.m16n8k16, ldmatrix).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <typeinfo>

#include "../common/status.h"
#include "block.h"

#define LONGVQ_DEVICE inline
#define __global__ static
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define threadIdx (on_host::position().thread)
#define blockIdx (on_host::position().block)
#define blockDim (on_host::position().block_size)
#define gridDim (on_host::position().grid)

inline void __syncthreads() {
  on_host::synchronize_block();
}

namespace longvq::cuda {

using std::max;
using std::min;

inline char* shared_memory() {
  return on_host::shared_memory();
}

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <typename T>
struct Exchange {
  T in, out;
  int from;

  static void run(void* const* lanes) {
    for (int lane = 0; lane < on_host::kWarpSize; ++lane) {
      auto* mine = static_cast<Exchange*>(lanes[lane]);
      mine->out = static_cast<Exchange*>(lanes[mine->from])->in;
    }
  }
};

template <typename T>
T shuffle_from(T x, int lane) {
  Exchange<T> exchange{x, x, lane};
  on_host::synchronize_warp(Exchange<T>::run, &exchange);
  return exchange.out;
}
template <typename T>
T shuffle_xor(T x, int mask) {
  return shuffle_from(x, on_host::position().lane ^ mask);
}
template <typename T>
T shuffle_up(T x, int by) {
  const int lane = on_host::position().lane;
  return shuffle_from(x, lane < by ? lane : lane - by);
}

struct Ballot {
  bool in;
  uint32_t out;

  static void run(void* const* lanes) {
    uint32_t bits = 0;
    for (int lane = 0; lane < on_host::kWarpSize; ++lane) {
      bits |= static_cast<uint32_t>(static_cast<Ballot*>(lanes[lane])->in) << lane;
    }
    for (int lane = 0; lane < on_host::kWarpSize; ++lane) {
      static_cast<Ballot*>(lanes[lane])->out = bits;
    }
  }
};
inline uint32_t ballot(bool x) {
  Ballot ballot{x, 0};
  on_host::synchronize_warp(Ballot::run, &ballot);
  return ballot.out;
}
inline int lowest_bit(uint32_t bits) {
  return __builtin_ffs(static_cast<int>(bits)) - 1;
}

inline void synchronize_warp() {
  on_host::synchronize_warp([](void* const*) {}, nullptr);
}

inline void hide_from_optimizer(int&) {}

constexpr double kPi = 3.14159265358979323846;
inline double cosine_of_pi(double x) {
  return std::cos(std::remainder(x, 2.0) * kPi);
}
inline double sine_of_pi(double x) {
  return std::sin(std::remainder(x, 2.0) * kPi);
}

inline float fast_exponential(float x) {
  return std::exp(x);
}

inline void store_16_bytes(void* to, const uint32_t (&x)[4]) {
  on_host::check_aligned(to);
  std::memcpy(to, x, sizeof x);
}

inline void copy_async(void* target, const void* source, int bytes) {
  on_host::copy_async(target, source, bytes);
}
inline void commit_copies() {
  on_host::commit_copies();
}
template <int NEWEST>
void wait_for_copies() {
  on_host::wait_for_copies(NEWEST);
}

inline float bfloat16_to_float(uint16_t bits) {
  return from_bits(static_cast<uint32_t>(bits) << 16);
}

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 31  ? (fraction == 0 ? INFINITY : NAN)
                          : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

// Round to nearest, ties to even.
inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = to_bits(x);
  return std::isnan(x) ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t float_to_half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) {
    return 0x7fff;
  }
  if (magnitude >= 65520) {
    return sign | 0x7c00;
  }
  int exponent = -13;  // for subnormal numbers, whose last bit is 2^-24
  if (magnitude >= 0x1p-14f) {
    std::frexp(magnitude, &exponent);
  }
  // In units of the last of 11 bits. If rounding carries, the sum below carries into the exponent.
  const auto mantissa = static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));
  return magnitude < 0x1p-14f ? sign | mantissa : static_cast<uint16_t>(sign | (((exponent + 13) << 10) + mantissa));
}

inline uint32_t round_to_bfloat16(float first, float second) {
  return float_to_bfloat16(first) | static_cast<uint32_t>(float_to_bfloat16(second)) << 16;
}
inline uint32_t round_to_half(float first, float second) {
  return float_to_half(first) | static_cast<uint32_t>(float_to_half(second)) << 16;
}

// Lane l gives the address of row l % 8 of matrix l / 8, eight numbers of 16 bits.
struct MatrixLoad {
  const void* row;
  uint32_t* out;

  template <bool TRANSPOSED>
  static void run(void* const* lanes) {
    for (int lane = 0; lane < on_host::kWarpSize; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t both = 0;
        for (int i = 0; i < 2; ++i) {
          const int row = TRANSPOSED ? lane % 4 * 2 + i : lane / 4, column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + i;
          const void* from = static_cast<MatrixLoad*>(lanes[matrix * 8 + row])->row;
          both |= static_cast<uint32_t>(static_cast<const uint16_t*>(from)[column]) << 16 * i;
        }
        static_cast<MatrixLoad*>(lanes[lane])->out[matrix] = both;
      }
    }
  }
};

inline void load_matrices(uint32_t (&out)[4], const void* row) {
  on_host::check_aligned(row);
  MatrixLoad load{row, out};
  on_host::synchronize_warp(MatrixLoad::run<false>, &load);
}
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  on_host::check_aligned(row);
  MatrixLoad load{row, out};
  on_host::synchronize_warp(MatrixLoad::run<true>, &load);
}

// Adds eight products to each column of a row of c, with the rounding of A100 tensor cores: every summand is truncated
// one bit below the last bit of the largest summand, and the sum is truncated to a float. Hopper adds sixteen products
// at a time and keeps two more bits. Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"; Khattak and
// Mikaitis 2025, arXiv 2512.07004. Compilers can vectorise all loops over columns.
inline void add_products(float (&c)[8], const float* a, const float (*b)[8]) {
  constexpr float kLeast = 1e-30f;  // below it the exponents here leave their range, and sums don't matter
  float products[8][8], largest[8], plain[8], scale[8], unit[8];
  bool finite = true;
  for (int i = 0; i < 8; ++i) {
    largest[i] = std::fabs(c[i]);
    plain[i] = c[i];
  }
  for (int k = 0; k < 8; ++k) {
    for (int i = 0; i < 8; ++i) {
      products[k][i] = a[k] * b[k][i];  // exact
      largest[i] = std::max(largest[i], std::fabs(products[k][i]));
      plain[i] += products[k][i];
    }
  }
  for (int i = 0; i < 8; ++i) {
    finite =
        finite && std::fabs(plain[i]) < INFINITY && largest[i] < INFINITY && (largest[i] > kLeast || largest[i] == 0);
  }
  if (!finite) {
    std::memcpy(c, plain, sizeof c);
    return;
  }
  int32_t sum[8];
  for (int i = 0; i < 8; ++i) {  // scale = 2^(24 − e) with 2^e ≤ largest < 2^(e + 1), unit = 1 / scale
    const uint32_t exponent = std::max(to_bits(largest[i]) >> 23, to_bits(kLeast) >> 23);
    scale[i] = from_bits((127 + 24 + 127 - exponent) << 23);
    unit[i] = from_bits((exponent - 24) << 23);
    sum[i] = static_cast<int32_t>(c[i] * scale[i]);  // conversion truncates
  }
  for (int k = 0; k < 8; ++k) {
    for (int i = 0; i < 8; ++i) {
      sum[i] += static_cast<int32_t>(products[k][i] * scale[i]);
    }
  }
  for (int i = 0; i < 8; ++i) {
    constexpr uint64_t kOfAFloat = ~uint64_t{0} << 29;  // the bits of a double that a float keeps
    double exact = sum[i];
    uint64_t bits;
    std::memcpy(&bits, &exact, sizeof bits);
    bits &= kOfAFloat;
    std::memcpy(&exact, &bits, sizeof bits);
    c[i] = static_cast<float>(exact) * unit[i];
  }
}

// C (16, 8) += A (16, 16) · B (16, 8). With g = lane / 4 and t = lane % 4, a lane holds of A rows g and g + 8, columns
// 2t, 2t + 1, 2t + 8 and 2t + 9; of B rows 2t, 2t + 1, 2t + 8 and 2t + 9, column g; of C rows g and g + 8, columns 2t
// and 2t + 1.
struct MatrixProduct {
  float* c;
  const uint32_t* a;
  uint32_t b[2];

  template <float (*TO_FLOAT)(uint16_t)>
  static void run(void* const* lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < on_host::kWarpSize; ++lane) {
      const auto* mine = static_cast<MatrixProduct*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        for (int half = 0; half < 2; ++half) {
          a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = TO_FLOAT(static_cast<uint16_t>(mine->a[i] >> 16 * half));
        }
      }
      for (int i = 0; i < 2; ++i) {
        for (int half = 0; half < 2; ++half) {
          b[2 * t + i * 8 + half][g] = TO_FLOAT(static_cast<uint16_t>(mine->b[i] >> 16 * half));
        }
      }
    }
    for (int row = 0; row < 16; ++row) {
      float c[8];
      const auto place = [&](int column) -> float& {
        return static_cast<MatrixProduct*>(lanes[row % 8 * 4 + column / 2])->c[row / 8 * 2 + column % 2];
      };
      for (int column = 0; column < 8; ++column) {
        c[column] = place(column);
      }
      add_products(c, a[row], b);
      add_products(c, a[row] + 8, b + 8);
      for (int column = 0; column < 8; ++column) {
        place(column) = c[column];
      }
    }
  }
};

inline void multiply_add_bfloat16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MatrixProduct product{c, a, {b0, b1}};
  on_host::synchronize_warp(MatrixProduct::run<bfloat16_to_float>, &product);
}
inline void multiply_add_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MatrixProduct product{c, a, {b0, b1}};
  on_host::synchronize_warp(MatrixProduct::run<half_to_float>, &product);
}

constexpr size_t kSharedBytes = 163 << 10;  // the most for a block on sm_80; Hopper has more

inline const char* error_text(int) {
  return "unknown error";
}

template <auto KERNEL>
struct Named;  // its type_info has the kernel in its name

template <auto KERNEL, typename... Arguments>
int launch(dim3 grid, int threads, size_t shared_bytes, void*, const Arguments&... arguments) {
  if (!on_host::should_run(typeid(Named<KERNEL>*).name(), shared_bytes)) {
    return 0;
  }
  if (shared_bytes > kSharedBytes) {
    return kUnsupported;
  }
  on_host::run_grid(grid, dim3(threads), shared_bytes, [&] { KERNEL(arguments...); });
  return 0;
}

}  // namespace longvq::cuda
