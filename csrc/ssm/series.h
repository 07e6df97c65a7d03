// Steps of a sequence as registers of floats and back, whatever their type and strides. For scan_kernel.cpp only.
#pragma once

#include "../simd.h"
#include "scan_kernel.h"

namespace longvq {
namespace {

// Conversions of whole registers, by integer arithmetic: every instruction set has that.

inline Floats from_bfloat16(Shorts x) { return reinterpret_cast<Floats>(__builtin_convertvector(x, Words) << 16); }

inline Shorts to_bfloat16(Floats x) {
  const Words bits = reinterpret_cast<Words>(x);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const Words nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, Shorts);
}

inline Floats from_half(Shorts x) {
  const Words h = __builtin_convertvector(x, Words);
  const Words magnitude = (h & 0x7fffu) << 13;
  // With the exponent taken for a float's, the value is 2^112 too small, subnormal or not.
  const Floats finite = reinterpret_cast<Floats>(magnitude) * 0x1p112f;
  const Words bits = magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000u : reinterpret_cast<Words>(finite);
  return reinterpret_cast<Floats>(bits | (h & 0x8000u) << 16);
}

inline Shorts to_half(Floats x) {
  const Words bits = reinterpret_cast<Words>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Normal: subtract 112 from the exponent and round away 13 bits, ties to even; a carry moves on into the exponent.
  const Words normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 leaves multiples of 2^-24, rounded to even, in the low bits.
  const Words subnormal = reinterpret_cast<Words>(reinterpret_cast<Floats>(magnitude) + 0.5f) - 0x3f000000u;
  const Words infinite = magnitude > 0x7f800000u ? Words{} + 0x7e00u : Words{} + 0x7c00u;
  Words half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? infinite : half;  // 65520 and more
  return __builtin_convertvector(half | sign, Shorts);
}

template <SeriesType TYPE>
struct Conversion;

template <>
struct Conversion<SeriesType::kFloat> {
  using Scalar = float;
  using Vector = Floats;
  static Floats load_from(Vector x) { return x; }
  static Vector store_as(Floats x) { return x; }
};

template <>
struct Conversion<SeriesType::kBFloat16> {
  using Scalar = uint16_t;
  using Vector = Shorts;
  static Floats load_from(Vector x) { return from_bfloat16(x); }
  static Vector store_as(Floats x) { return to_bfloat16(x); }
};

template <>
struct Conversion<SeriesType::kHalf> {
  using Scalar = uint16_t;
  using Vector = Shorts;
  static Floats load_from(Vector x) { return from_half(x); }
  static Vector store_as(Floats x) { return to_half(x); }
};

constexpr int kLine = 16;                  // channels that are read and written together: floats of a cache line
constexpr int kGroups = kLine / kLanes;    // registers of a line
constexpr int64_t kPrefetch = 16;          // steps; neighbours in time are too far apart for the hardware to guess

// Channels that are there among those of register `group` of a line with `channels`.
inline int64_t channels_of(int64_t channels, int group) {
  const int64_t left = channels - group * kLanes;
  return left < 0 ? 0 : left < kLanes ? left : kLanes;
}

// Which steps of a row count: true in `data` masks one out. nullptr: all count.
struct Mask {
  const bool* data;
  int64_t stride;

  bool covers(int64_t step) const { return data != nullptr && data[step * stride]; }
};

template <SeriesType TYPE>
struct Steps {
  using Convert = Conversion<TYPE>;
  using Scalar = typename Convert::Scalar;
  using Vector = typename Convert::Vector;

  static void read(const Scalar* step, const Series& series, int64_t channels, Floats* out, int64_t out_stride) {
    if (channels == kLine && series.channel_stride == 1) {
      for (int g = 0; g < kGroups; ++g) {
        out[g * out_stride] = Convert::load_from(load<Vector>(step + g * kLanes));
      }
      return;
    }
    for (int g = 0; g < kGroups; ++g) {
      Vector values{};
      for (int64_t i = 0; i < channels_of(channels, g); ++i) {
        values[i] = step[(g * kLanes + i) * series.channel_stride];
      }
      out[g * out_stride] = Convert::load_from(values);
    }
  }

  static void write(Scalar* step, const Series& series, int64_t channels, const Floats* in, int64_t in_stride) {
    if (channels == kLine && series.channel_stride == 1) {
      for (int g = 0; g < kGroups; ++g) {
        store(step + g * kLanes, Convert::store_as(in[g * in_stride]));
      }
      return;
    }
    for (int g = 0; g < kGroups; ++g) {
      const Vector values = Convert::store_as(in[g * in_stride]);
      for (int64_t i = 0; i < channels_of(channels, g); ++i) {
        step[(g * kLanes + i) * series.channel_stride] = values[i];
      }
    }
  }
};

// Steps first .. first + count of a line: registers out[group * out_stride + step - first], zeros where masked and in
// lanes without a channel.
template <SeriesType TYPE>
void read_as(
    const Series& series, int64_t channels, const Mask& mask, int64_t first, int64_t count, Floats* out,
    int64_t out_stride) {
  const auto* step = static_cast<const typename Steps<TYPE>::Scalar*>(series.data) + first * series.step_stride;
  for (int64_t t = 0; t < count; ++t, step += series.step_stride) {
    __builtin_prefetch(step + kPrefetch * series.step_stride);
    Steps<TYPE>::read(step, series, channels, out + t, out_stride);
  }
  for (int64_t t = 0; mask.data != nullptr && t < count; ++t) {
    for (int g = 0; mask.covers(first + t) && g < kGroups; ++g) {
      out[g * out_stride + t] = Floats{};
    }
  }
}

// Masked steps become zero in `in` as well.
template <SeriesType TYPE>
void write_as(
    const Series& series, int64_t channels, const Mask& mask, int64_t first, int64_t count, Floats* in,
    int64_t in_stride) {
  for (int64_t t = 0; mask.data != nullptr && t < count; ++t) {
    for (int g = 0; mask.covers(first + t) && g < kGroups; ++g) {
      in[g * in_stride + t] = Floats{};
    }
  }
  auto* step = static_cast<typename Steps<TYPE>::Scalar*>(series.data) + first * series.step_stride;
  for (int64_t t = 0; t < count; ++t, step += series.step_stride) {
    __builtin_prefetch(step + kPrefetch * series.step_stride, 1);
    Steps<TYPE>::write(step, series, channels, in + t, in_stride);
  }
}

template <SeriesType TYPE>
struct TypeConstant {
  static constexpr SeriesType value = TYPE;
};

// call(TypeConstant) for a type known only now.
template <typename Call>
inline void for_type(SeriesType type, const Call& call) {
  switch (type) {
    case SeriesType::kFloat:
      return call(TypeConstant<SeriesType::kFloat>{});
    case SeriesType::kBFloat16:
      return call(TypeConstant<SeriesType::kBFloat16>{});
    case SeriesType::kHalf:
      return call(TypeConstant<SeriesType::kHalf>{});
  }
}

inline void read_steps(
    const Series& series, int64_t channels, const Mask& mask, int64_t first, int64_t count, Floats* out,
    int64_t out_stride) {
  for_type(series.type, [&](auto type) {
    read_as<type.value>(series, channels, mask, first, count, out, out_stride);
  });
}

inline void write_steps(
    const Series& series, int64_t channels, const Mask& mask, int64_t first, int64_t count, Floats* in,
    int64_t in_stride) {
  for_type(series.type, [&](auto type) {
    write_as<type.value>(series, channels, mask, first, count, in, in_stride);
  });
}

}  // namespace
}  // namespace longvq
