// Loads steps of a sequence with any dtype and strides into registers of floats, and stores them. For scan_kernel.cpp
// only.
#pragma once

#include "../../common/convert.h"
#include "scan_kernel.h"

namespace longvq {
namespace {

constexpr int kLine = 16;                // channels of a line: the floats of a cache line
constexpr int kGroups = kLine / kLanes;  // registers of a line
constexpr int64_t kPrefetch = 16;        // steps ahead; steps lie too far apart for the hardware prefetcher

// The number of channels in register `group` of a line with `channels` channels.
inline int64_t channels_of(int64_t channels, int group) {
  const int64_t left = channels - group * kLanes;
  return left < 0 ? 0 : left < kLanes ? left : kLanes;
}

// The mask of a row; true in `data` masks a step. nullptr: no step is masked.
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

// Loads steps first .. first + count of a line into registers out[group * out_stride + step - first]. Masked steps and
// lanes without a channel become zero.
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

// Stores steps; masked steps are stored as zero, and become zero in `in` too.
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
