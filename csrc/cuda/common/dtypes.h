// The dtypes of tensors, and how each becomes an operand of tensor cores.
//
// Tensor cores multiply 16-bit numbers and add in float32. bfloat16 and float16 are operands as they are. A float32
// becomes the sum of three bfloat16 terms, which together hold its 24 bits. The product of two such sums has nine
// products of terms; six of them reach its last bit, and only these are computed.
#pragma once

#include "device.h"

namespace longvq::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

LONGVQ_DEVICE float to_float(float x) {
  return x;
}
LONGVQ_DEVICE float to_float(BFloat16 x) {
  return from_bits(static_cast<uint32_t>(x.bits) << 16);
}
LONGVQ_DEVICE float to_float(Half x) {
  return half_to_float(x.bits);
}

LONGVQ_DEVICE void store(float* out, float x) {
  *out = x;
}
LONGVQ_DEVICE void store(BFloat16* out, float x) {
  out->bits = static_cast<uint16_t>(round_to_bfloat16(x, 0.0f));
}
LONGVQ_DEVICE void store(Half* out, float x) {
  out->bits = static_cast<uint16_t>(round_to_half(x, 0.0f));
}

// Two numbers side by side, written in one access; their address must be a multiple of their size.
struct alignas(8) TwoFloats {
  float first, second;
};
LONGVQ_DEVICE void store_pair(float* out, float x, float y) {
  *reinterpret_cast<TwoFloats*>(out) = {x, y};
}
LONGVQ_DEVICE void store_pair(BFloat16* out, float x, float y) {
  *reinterpret_cast<uint32_t*>(out) = round_to_bfloat16(x, y);
}
LONGVQ_DEVICE void store_pair(Half* out, float x, float y) {
  *reinterpret_cast<uint32_t*>(out) = round_to_half(x, y);
}

// Writes columns `column` (even) and column + 1 of a row that has `columns` columns. `pairs`: both may be written in
// one access, because `columns` is even and the row is aligned to a pair.
template <typename Element>
LONGVQ_DEVICE void store_columns(Element* row, int column, int columns, bool pairs, float x, float y) {
  if (pairs) {
    if (column < columns) {
      store_pair(row + column, x, y);
    }
    return;
  }
  if (column < columns) {
    store(row + column, x);
  }
  if (column + 1 < columns) {
    store(row + column + 1, y);
  }
}

// A float32 as the exact sum of three bfloat16 terms. Terms are truncated, not rounded, so that none overflows.
// Infinity and NaN become NaN.
struct ThreeBFloat16 {
  static constexpr int kTerms = 3;

  LONGVQ_DEVICE static void split(float x, uint16_t (&terms)[kTerms]) {
#pragma unroll
    for (int i = 0; i < kTerms; ++i) {
      const uint32_t bits = to_bits(x) & 0xffff0000u;
      terms[i] = static_cast<uint16_t>(bits >> 16);
      x -= from_bits(bits);
    }
  }
  LONGVQ_DEVICE static void split_pair(float first, float second, uint32_t (&terms)[kTerms]) {
    uint16_t low[kTerms], high[kTerms];
    split(first, low);
    split(second, high);
#pragma unroll
    for (int i = 0; i < kTerms; ++i) {
      terms[i] = low[i] | static_cast<uint32_t>(high[i]) << 16;
    }
  }
  LONGVQ_DEVICE static void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_add_bfloat16(c, a, b0, b1);
  }
  LONGVQ_DEVICE static float exponential(float x) { return expf(x); }
};

// One 16-bit number, rounded to nearest by Format::round.
template <typename Format>
struct OneTerm {
  static constexpr int kTerms = 1;

  LONGVQ_DEVICE static void split(float x, uint16_t (&terms)[kTerms]) {
    terms[0] = static_cast<uint16_t>(Format::round(x, 0.0f));
  }
  LONGVQ_DEVICE static void split_pair(float first, float second, uint32_t (&terms)[kTerms]) {
    terms[0] = Format::round(first, second);
  }
  LONGVQ_DEVICE static float exponential(float x) { return fast_exponential(x); }
};

struct OneBFloat16 : OneTerm<OneBFloat16> {
  LONGVQ_DEVICE static uint32_t round(float first, float second) { return round_to_bfloat16(first, second); }
  LONGVQ_DEVICE static void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_add_bfloat16(c, a, b0, b1);
  }
};

struct OneHalf : OneTerm<OneHalf> {
  LONGVQ_DEVICE static uint32_t round(float first, float second) { return round_to_half(first, second); }
  LONGVQ_DEVICE static void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_add_half(c, a, b0, b1);
  }
};

// The operand of tensor cores that a dtype becomes.
template <typename Element>
struct OperandOf;
template <>
struct OperandOf<float> {
  using type = ThreeBFloat16;
};
template <>
struct OperandOf<BFloat16> {
  using type = OneBFloat16;
};
template <>
struct OperandOf<Half> {
  using type = OneHalf;
};

}  // namespace longvq::cuda
