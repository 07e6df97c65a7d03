// Steps of a sequence as registers of floats and back, whatever their type and strides. For scan_kernel.cpp only.
#pragma once

#include "../../common/convert.h"
#include "scan_kernel.h"

namespace longvq {
namespace {

constexpr int kLine = 16;                // channels that are read and written together: floats of a cache line
constexpr int kGroups = kLine / kLanes;  // registers of a line
constexpr int64_t kPrefetch = 16;        // steps; neighbours in time are too far apart for the hardware to guess

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

template <ElementType TYPE>
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
      const int64_t stride = series.channel_stride;
      const Scalar* first = step + g * kLanes * stride;
      out[g * out_stride] = Convert::load_from(gather<Vector>(first, stride, channels - g * kLanes));
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
      const int64_t stride = series.channel_stride;
      scatter(Convert::store_as(in[g * in_stride]), step + g * kLanes * stride, stride, channels - g * kLanes);
    }
  }
};

// Steps first .. first + count of a line: registers out[group * out_stride + step - first], zeros where masked and in
// lanes without a channel.
template <ElementType TYPE>
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
template <ElementType TYPE>
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

inline void read_steps(
    const Series& series, int64_t channels, const Mask& mask, int64_t first, int64_t count, Floats* out,
    int64_t out_stride) {
  for_type(series.type, [&](auto type) { read_as<type.value>(series, channels, mask, first, count, out, out_stride); });
}

inline void write_steps(
    const Series& series, int64_t channels, const Mask& mask, int64_t first, int64_t count, Floats* in,
    int64_t in_stride) {
  for_type(series.type, [&](auto type) { write_as<type.value>(series, channels, mask, first, count, in, in_stride); });
}

}  // namespace
}  // namespace longvq
