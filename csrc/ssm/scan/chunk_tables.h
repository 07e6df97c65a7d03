// The matrices of a chunk, which all chunks share. For scan_kernel.cpp only.
//
// With lambda = exp(log_decay), a chunk of kChunk = T steps with inputs u and entry state x gives, per channel,
//     y_t = sum_s K[t - s] u_s + Re sum_n out[t, n] x_n           K[l] = Re sum_n w_n lambda_n^l,  out = w lambda^(t+1)
//     x' = lambda^T x + sum_t into[t] u_t                         into[t] = lambda^(T-1-t)
// The adjoint in reversed time has the same form with out = lambda^t and into = w lambda^(T-t).
// A complex mode is two real columns, its real and imaginary part. Powers are computed in double and rounded once.
#pragma once

#include "../../common/numbers.h"
#include "../../common/simd.h"
#include "exponential.h"
#include "scan_kernel.h"
#include "series.h"

namespace longvq {
namespace {

constexpr int kChunk = 32;                    // T: work inside chunks grows with T, work between chunks shrinks
constexpr int kPanel = kLanes == 16 ? 4 : 2;  // columns of a panel, computed in one pass over the rows

// Allocates arrays from the scratch memory. An Arena that starts at 0 only measures: at the end, `next` is the number
// of bytes needed.
struct Arena {
  uintptr_t next;

  template <typename T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(next);
    next += static_cast<uintptr_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return array;
  }
};

struct Complex {
  Doubles re, im;
};

// The part of a matrix for register `group` of a line.
inline ModeMatrix group_of(const ModeMatrix& matrix, int group) {
  ModeMatrix part = matrix;
  if (part.data != nullptr) {
    part.data += group * kLanes * matrix.channel_stride;
  }
  return part;
}

inline ScanModel group_of(const ScanModel& model, int group) {
  ScanModel part = model;
  part.channels = channels_of(model.channels, group);
  part.log_decay = group_of(model.log_decay, group);
  part.weight = group_of(model.weight, group);
  if (part.skip != nullptr) {
    part.skip += group * kLanes * model.skip_stride;
  }
  return part;
}

// sum + a b, with two fused multiply-adds for each of re and im. Real modes use re only.
template <bool COMPLEX>
inline Complex plus_product(const Complex& sum, const Complex& a, const Complex& b) {
  if (!COMPLEX) {
    return {sum.re + a.re * b.re, Doubles{}};
  }
  return {(sum.re + a.re * b.re) - a.im * b.im, (sum.im + a.re * b.im) + a.im * b.re};
}

template <bool COMPLEX>
inline Complex product(const Complex& a, const Complex& b) {
  if (!COMPLEX) {
    return {a.re * b.re, Doubles{}};
  }
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

template <bool COMPLEX>
inline Complex plus_scaled(const Complex& sum, const Complex& a, double factor) {
  return {sum.re + a.re * factor, COMPLEX ? sum.im + a.im * factor : Doubles{}};
}

// Half h of one mode; zero in lanes without a channel, and for an absent matrix.
inline Complex read_mode(const ModeMatrix& matrix, int64_t channels, int64_t mode, bool complex_modes, int h) {
  Complex value{};
  if (matrix.data != nullptr) {
    for (int i = 0; i < kHalf && h * kHalf + i < channels; ++i) {
      const float* entry = matrix.data + (h * kHalf + i) * matrix.channel_stride + mode * matrix.mode_stride;
      value.re[i] = entry[0];
      value.im[i] = complex_modes ? entry[1] : 0.0f;
    }
  }
  return value;
}

inline Complex read_column(const Floats* column, bool complex_modes, int h) {
  return {widened(column, h), complex_modes ? widened(column + 1, h) : Doubles{}};
}

inline void write_column(Floats* column, bool complex_modes, int h, const Complex& value) {
  narrow(column, h, value.re);
  if (complex_modes) {
    narrow(column + 1, h, value.im);
  }
}

inline void write_mode(
    const ModeMatrix& matrix, int64_t channels, int64_t mode, bool complex_modes, int h, const Complex& value) {
  if (matrix.data != nullptr) {
    for (int i = 0; i < kHalf && h * kHalf + i < channels; ++i) {
      float* entry = matrix.data + (h * kHalf + i) * matrix.channel_stride + mode * matrix.mode_stride;
      entry[0] = static_cast<float>(value.re[i]);
      if (complex_modes) {
        entry[1] = static_cast<float>(value.im[i]);
      }
    }
  }
}

// lambda = exp(log_decay) of one mode.
inline Complex decay_of(const ScanModel& model, int64_t mode, int h) {
  const Complex rate = read_mode(model.log_decay, model.channels, mode, model.complex_modes, h);
  const Doubles size = exp_negative(rate.re);
  if (!model.complex_modes) {
    return {size, Doubles{}};
  }
  Doubles sine, cosine;
  sincos(rate.im, sine, cosine);
  return {size * cosine, size * sine};
}

// The tables for one register of channels.
struct ChunkTables {
  int64_t modes, columns, padded_columns;  // columns: 2 N if complex, else N; padded to whole panels
  bool complex_modes;
  Floats* into;    // (padded_columns / kPanel, kChunk, kPanel): panels of columns
  Floats* out;     // (kChunk / kPanel, padded_columns, kPanel): panels of steps
  Floats* kernel;  // (kChunk,) K, with the skip weight added to K[0]
  // These are (N, halves, real and imaginary part).
  Doubles* decay;        // lambda
  Doubles* chunk_decay;  // lambda^kChunk
  Doubles* tail_decay;   // lambda^tail_steps, of the last, unfinished chunk
  int64_t tail_steps;

  void allocate(int64_t modes_, bool complex_modes_, Arena& arena) {
    modes = modes_;
    complex_modes = complex_modes_;
    columns = complex_modes ? 2 * modes : modes;
    padded_columns = round_up(columns, kPanel);
    into = arena.take<Floats>(kChunk * padded_columns);
    out = arena.take<Floats>(kChunk * padded_columns);
    kernel = arena.take<Floats>(kChunk);
    decay = arena.take<Doubles>(4 * modes);
    chunk_decay = arena.take<Doubles>(4 * modes);
    tail_decay = arena.take<Doubles>(4 * modes);
  }

  int64_t entry(int64_t mode, int h) const {
    return 4 * mode + 2 * h;
  }  // index of the real part; the imaginary part follows

  Complex get(const Doubles* table, int64_t mode, int h) const {
    return {table[entry(mode, h)], table[entry(mode, h) + 1]};
  }

  void set(Doubles* table, int64_t mode, int h, const Complex& value) const {
    table[entry(mode, h)] = value.re;
    table[entry(mode, h) + 1] = value.im;
  }

  void fill(const ScanModel& model, bool adjoint) {
    // If all sequences are shorter than a chunk, only the beginning of the tables is used.
    const int steps = model.longest < kChunk ? static_cast<int>(model.longest) : kChunk;
    if (steps < kChunk || padded_columns > columns) {
      for (int64_t i = 0; i < kChunk * padded_columns; ++i) {
        into[i] = Floats{};
      }
    }
    Doubles sums[kChunk][2] = {};  // K
    for (int64_t n = 0; n < modes; ++n) {
      complex_modes ? fill_mode<true>(model, adjoint, n, steps, sums)
                    : fill_mode<false>(model, adjoint, n, steps, sums);
    }
    for (int t = 0; t < kChunk; ++t) {
      for (int h = 0; h < 2; ++h) {
        if (t == 0 && model.skip != nullptr) {
          for (int i = 0; i < kHalf && h * kHalf + i < model.channels; ++i) {
            sums[0][h][i] += model.skip[(h * kHalf + i) * model.skip_stride];
          }
        }
        narrow(kernel + t, h, sums[t][h]);
      }
    }
    tail_steps = -1;
  }

  void set_tail(int64_t steps) {
    if (steps == tail_steps) {
      return;
    }
    tail_steps = steps;
    for (int64_t n = 0; n < modes; ++n) {
      for (int h = 0; h < 2; ++h) {
        const Complex lambda = get(decay, n, h);
        Complex power{broadcast(1.0), Doubles{}};
        for (int64_t t = 0; t < steps; ++t) {
          power = product<true>(power, lambda);
        }
        set(tail_decay, n, h, power);
      }
    }
  }

 private:
  template <bool COMPLEX>
  void fill_mode(const ScanModel& model, bool adjoint, int64_t n, int steps, Doubles (&sums)[kChunk][2]) {
    const int64_t column = COMPLEX ? 2 * n : n, out_panel = padded_columns * kPanel;
    // Both columns of a complex mode are in one panel.
    Floats* in = into + (column / kPanel * kChunk + kChunk - 1) * kPanel + column % kPanel;
    Floats* from = out + column * kPanel;
    Complex lambda[2], power[2], weighted[2];  // lambda, lambda^t, w lambda^t
    for (int h = 0; h < 2; ++h) {
      lambda[h] = decay_of(model, n, h);
      power[h] = {broadcast(1.0), Doubles{}};
      weighted[h] = read_mode(model.weight, model.channels, n, COMPLEX, h);
    }
    for (int t = 0; t < steps; ++t, in -= kPanel) {
      for (int h = 0; h < 2; ++h) {
        sums[t][h] += weighted[h].re;
        weighted[h] = product<COMPLEX>(weighted[h], lambda[h]);
        const Complex& entering = adjoint ? weighted[h] : power[h];
        const Complex& leaving = adjoint ? power[h] : weighted[h];
        narrow(in, h, entering.re);
        narrow(from, h, leaving.re);
        if (COMPLEX) {  // Re(out x) = re re - im im: the table has -im
          narrow(in + 1, h, entering.im);
          narrow(from + kPanel, h, -leaving.im);
        }
        power[h] = product<COMPLEX>(power[h], lambda[h]);
      }
      from += t % kPanel == kPanel - 1 ? out_panel - (kPanel - 1) : 1;
    }
    for (int h = 0; h < 2; ++h) {
      set(decay, n, h, lambda[h]);
      set(chunk_decay, n, h, power[h]);
    }
  }
};

}  // namespace
}  // namespace longvq
