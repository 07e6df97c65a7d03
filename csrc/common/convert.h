// Conversion of rows of float32, bfloat16 and float16 to float32 and back.
//
// The conversions are integer operations on whole registers, which every instruction set has. So this header can be
// used both in files that are compiled once per instruction set and in files that are compiled once, with the registers
// of the baseline. Rounding is to nearest, ties to even. NaN stays NaN. Subnormal numbers are converted exactly, even
// if the caller flushes them to zero.
#pragma once

#include "dtype.h"
#include "simd.h"

namespace longvq {

namespace {

inline const void* element_at(const void* data, ElementType type, int64_t index) {
  return static_cast<const char*>(data) + index * element_size(type);
}

inline void* element_at(void* data, ElementType type, int64_t index) {
  return static_cast<char*>(data) + index * element_size(type);
}

inline Floats from_bfloat16(Shorts x) {
  return reinterpret_cast<Floats>(__builtin_convertvector(x, Words) << 16);
}

inline Shorts to_bfloat16(Floats x) {
  const Words bits = reinterpret_cast<Words>(x);
  const SignedWords magnitude = reinterpret_cast<SignedWords>(bits & 0x7fffffffu);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector(magnitude > 0x7f800000 ? nan : rounded, Shorts);
}

inline Floats from_half(Shorts x) {
  const Words h = __builtin_convertvector(x, Words);
  const SignedWords magnitude = reinterpret_cast<SignedWords>(h & 0x7fffu);
  const SignedWords normal = (magnitude << 13) + (112 << 23);  // adds 112 to the exponent
  const SignedWords subnormal = reinterpret_cast<SignedWords>(__builtin_convertvector(magnitude, Floats) * 0x1p-24f);
  SignedWords bits = magnitude < 0x400 ? subnormal : normal;
  bits |= magnitude >= 0x7c00 ? SignedWords{} + 0x7f800000 : SignedWords{};
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(bits) | (h & 0x8000u) << 16);
}

inline Shorts to_half(Floats x) {
  // Sums are unsigned, because they may wrap. Comparisons are signed, because every instruction set has signed ones.
  const Words bits = reinterpret_cast<Words>(x), sign = (bits >> 16) & 0x8000u, positive = bits & 0x7fffffffu;
  const SignedWords magnitude = reinterpret_cast<SignedWords>(positive);
  // Normal: subtract 112 from the exponent and round away 13 bits; a carry goes into the exponent.
  const SignedWords normal =
      reinterpret_cast<SignedWords>((positive - (112u << 23) + 0xfffu + ((positive >> 13) & 1u)) >> 13);
  // Below 2^-14: after 0.5 is added, the low bits are the number in units of 2^-24, rounded to even.
  const SignedWords subnormal =
      reinterpret_cast<SignedWords>(reinterpret_cast<Words>(reinterpret_cast<Floats>(positive) + 0.5f) - 0x3f000000u);
  const SignedWords infinite = magnitude > 0x7f800000 ? SignedWords{} + 0x7e00 : SignedWords{} + 0x7c00;
  SignedWords half = magnitude < (113 << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? infinite : half;  // 65520 and more
  return __builtin_convertvector(reinterpret_cast<Words>(half) | sign, Shorts);
}

template <ElementType TYPE>
struct Conversion;

template <>
struct Conversion<ElementType::kFloat> {
  using Scalar = float;
  using Vector = Floats;
  static Floats load_from(Vector x) { return x; }
  static Vector store_as(Floats x) { return x; }
};

template <>
struct Conversion<ElementType::kBFloat16> {
  using Scalar = uint16_t;
  using Vector = Shorts;
  static Floats load_from(Vector x) { return from_bfloat16(x); }
  static Vector store_as(Floats x) { return to_bfloat16(x); }
};

template <>
struct Conversion<ElementType::kHalf> {
  using Scalar = uint16_t;
  using Vector = Shorts;
  static Floats load_from(Vector x) { return from_half(x); }
  static Vector store_as(Floats x) { return to_half(x); }
};

template <ElementType TYPE>
struct TypeConstant {
  static constexpr ElementType value = TYPE;
};

// Runs call(TypeConstant) for a type that is only known at run time.
template <typename Call>
inline void for_type(ElementType type, const Call& call) {
  switch (type) {
    case ElementType::kFloat:
      return call(TypeConstant<ElementType::kFloat>{});
    case ElementType::kBFloat16:
      return call(TypeConstant<ElementType::kBFloat16>{});
    case ElementType::kHalf:
      return call(TypeConstant<ElementType::kHalf>{});
  }
}

// Fills the first `count` lanes, at most all, from elements `stride` apart; the other lanes are 0.
template <typename Vector, typename Scalar>
inline Vector gather(const Scalar* in, int64_t stride, int64_t count) {
  Vector values{};
  for (int64_t i = 0; i < count && i < kLanes; ++i) {
    values[i] = in[i * stride];
  }
  return values;
}

template <typename Vector, typename Scalar>
inline void scatter(Vector values, Scalar* out, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < count && i < kLanes; ++i) {
    out[i * stride] = values[i];
  }
}

// out[i] = data[i * stride] for i < count.
inline void load_row(const void* data, ElementType type, int64_t stride, int64_t count, float* out) {
  for_type(type, [&](auto known) {
    using Convert = Conversion<known.value>;
    const auto* in = static_cast<const typename Convert::Scalar*>(data);
    int64_t i = 0;
    for (; stride == 1 && i + kLanes <= count; i += kLanes) {
      store(out + i, Convert::load_from(load<typename Convert::Vector>(in + i)));
    }
    for (; i < count; i += kLanes) {
      const auto values = gather<typename Convert::Vector>(in + i * stride, stride, count - i);
      scatter(Convert::load_from(values), out + i, 1, count - i);
    }
  });
}

// data[i * stride] = in[i] for i < count.
inline void store_row(const float* in, int64_t count, void* data, ElementType type, int64_t stride) {
  for_type(type, [&](auto known) {
    using Convert = Conversion<known.value>;
    auto* out = static_cast<typename Convert::Scalar*>(data);
    int64_t i = 0;
    for (; stride == 1 && i + kLanes <= count; i += kLanes) {
      store(out + i, Convert::store_as(load<Floats>(in + i)));
    }
    for (; i < count; i += kLanes) {
      scatter(Convert::store_as(gather<Floats>(in + i, 1, count - i)), out + i * stride, stride, count - i);
    }
  });
}

}  // namespace
}  // namespace longvq
