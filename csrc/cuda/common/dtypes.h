// The types that tensors come in, and what tensor cores make of them.
//
// Tensor cores multiply 16-bit numbers and add in float32. bfloat16 and float16 go in as they are. A float32 goes in as
// the sum of three bfloat16, which together hold its 24 bits: a product of two such numbers is the sum of the six
// products of parts that are not below its last bit.
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

// Two numbers side by side in one access, at a multiple of their size.
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

// Numbers of column `column`, an even one, and the next of a row that has so many. `pairs`: that is an even number, and
// the row begins where a pair may.
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

// A float32 cut into three bfloat16, exactly: the sum of the three is `x`. Cut off, not rounded, so that no part
// overflows; infinity and NaN make NaN.
struct ThreeParts {
  static constexpr int kParts = 3;

  LONGVQ_DEVICE static void split(float x, uint16_t (&parts)[kParts]) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const uint32_t bits = to_bits(x) & 0xffff0000u;
      parts[i] = static_cast<uint16_t>(bits >> 16);
      x -= from_bits(bits);
    }
  }
  LONGVQ_DEVICE static void split_pair(float first, float second, uint32_t (&parts)[kParts]) {
    uint16_t low[kParts], high[kParts];
    split(first, low);
    split(second, high);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      parts[i] = low[i] | static_cast<uint32_t>(high[i]) << 16;
    }
  }
  LONGVQ_DEVICE static void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_add_bfloat16(c, a, b0, b1);
  }
  LONGVQ_DEVICE static float exponential(float x) { return expf(x); }
};

struct OneBFloat16 {
  static constexpr int kParts = 1;

  LONGVQ_DEVICE static void split(float x, uint16_t (&parts)[kParts]) {
    parts[0] = static_cast<uint16_t>(round_to_bfloat16(x, 0.0f));
  }
  LONGVQ_DEVICE static void split_pair(float first, float second, uint32_t (&parts)[kParts]) {
    parts[0] = round_to_bfloat16(first, second);
  }
  LONGVQ_DEVICE static void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_add_bfloat16(c, a, b0, b1);
  }
  LONGVQ_DEVICE static float exponential(float x) { return fast_exponential(x); }
};

struct OneHalf {
  static constexpr int kParts = 1;

  LONGVQ_DEVICE static void split(float x, uint16_t (&parts)[kParts]) {
    parts[0] = static_cast<uint16_t>(round_to_half(x, 0.0f));
  }
  LONGVQ_DEVICE static void split_pair(float first, float second, uint32_t (&parts)[kParts]) {
    parts[0] = round_to_half(first, second);
  }
  LONGVQ_DEVICE static void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_add_half(c, a, b0, b1);
  }
  LONGVQ_DEVICE static float exponential(float x) { return fast_exponential(x); }
};

// What numbers of a type are to the tensor cores.
template <typename Element>
struct OperandOf;
template <>
struct OperandOf<float> {
  using type = ThreeParts;
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
