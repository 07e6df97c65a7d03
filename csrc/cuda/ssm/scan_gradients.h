// Gradients of the scan's parameters, without stored states. With z the derivative of the state by log_decay,
//
//     dL/dw = Σ_t g_t x_t        dL/dlog_decay = w Σ_t g_t z_t
//
// which by chunks, whose states are X and Z when they are entered, are
//
//     Σ_l λ^l c_l + Σ_chunks Q X        w (Σ_l l λ^l c_l + Σ_chunks (Q Z + Q' X))
//
// with lag products c_l = Σ g_t u_{t−l} inside chunks, Q = Σ_t λ^(t+1) g_t and Q' = Σ_t (t+1) λ^(t+1) g_t. Products of
// the chunks with four tables, and one of the gradients with the inputs of all chunks, run on tensor cores.
#pragma once

#include <initializer_list>

#include "scan_block.h"

namespace longvq::cuda {
namespace {

// Four tables a group leave room for half as many channels as the scan has.
template <typename Element>
using DifferentiatingBlock = ScanBlock<Element, ScanOperand<Element>::kParts == 1 ? 4 : 2>;

// The state and its derivative.
struct Pair {
  Number x, z;
};

// Some steps later, power = λ^steps, plus what is given.
LONGVQ_DEVICE Pair move(Number power, float steps, Pair from, Pair given) {
  const Number z{from.z.re + steps * from.x.re, from.z.im + steps * from.x.im};
  return {multiply_add(power, from.x, given.x), multiply_add(power, z, given.z)};
}

template <typename Element>
struct ScanDifferentiating : DifferentiatingBlock<Element> {
  using Base = DifferentiatingBlock<Element>;
  using Base::begin, Base::channel, Base::end, Base::has_channel, Base::lane, Base::of, Base::p, Base::padded,
      Base::warp;
  using typename Base::Chunks, typename Base::Layout, typename Base::Operand;
  static constexpr int kParts = Base::kParts, kChannels = Base::kChannels, kThreads = Base::kThreads;
  static constexpr int kSteps = kScanSteps, kSums = 4;  // of a mode: of weight and log_decay, real and imaginary

  const ScanGradients& g;
  float lags[2][kTiles][4] = {};  // (gradients, inputs) of steps of a chunk, over all chunks so far

  LONGVQ_DEVICE ScanDifferentiating(const ScanGradients& problem, const Piece& piece)
      : Base(problem.scan, piece), g(problem) {}

  static size_t bytes(int64_t modes) {
    const size_t tables = sizeof(uint16_t) * kChannels * scan_gradient_table_size(modes, kParts);
    const size_t states = sizeof(Number) * kChannels * padded_modes(modes) * (kScanPowers + 2);
    const size_t sums = sizeof(double) * kChannels * (padded_modes(modes) * kSums + kSteps);
    return tables + 2 * kChannels * Chunks::kBytes + states + sums;
  }

  LONGVQ_DEVICE uint16_t* tables(int of) const {
    return reinterpret_cast<uint16_t*>(shared_memory()) + of * scan_gradient_table_size(p.modes.modes, kParts);
  }
  LONGVQ_DEVICE Chunks inputs(int of) const { return Base::next({tables(kChannels)}, of); }
  LONGVQ_DEVICE Chunks grads(int of) const { return inputs(kChannels + of); }
  LONGVQ_DEVICE double* sums(int of) const {
    return reinterpret_cast<double*>(inputs(2 * kChannels).data) + of * (padded * kSums + kSteps);
  }
  LONGVQ_DEVICE double* lag_sums(int of) const { return sums(of) + padded * kSums; }
  LONGVQ_DEVICE Number* decays(int of) const {
    return reinterpret_cast<Number*>(sums(kChannels)) + of * padded * kScanPowers;
  }
  // The state and its derivative.
  LONGVQ_DEVICE Number* state(int of) const { return decays(kChannels) + of * padded * 2; }

  LONGVQ_DEVICE Number* segment_states(int64_t mode) const {
    const int64_t row = of.batch * p.modes.channels + channel;
    return reinterpret_cast<Number*>(g.segment_states) +
           ((row * p.segments() + this->segment_of_row()) * p.modes.modes + mode) * 2;
  }

  LONGVQ_DEVICE void start(Pass pass) const {
    for (int64_t i = lane; i < padded * kSums + kSteps; i += 32) {
      sums(warp)[i] = 0;
    }
    for (int64_t mode = lane; mode < padded; mode += 32) {
      Pair entry{{0, 0}, {0, 0}};
      if (has_channel() && mode < p.modes.modes && pass == Pass::kResults) {
        if (g.segment_states != nullptr) {
          const Number* from = segment_states(mode);
          entry = {from[0], from[1]};
        } else if (p.initial_state != nullptr) {
          const float* from = p.initial_state + this->state_place(mode) * (p.modes.complex_modes ? 2 : 1);
          entry.x = {from[0], p.modes.complex_modes ? from[1] : 0.0f};
        }
      }
      keep(mode, entry);
    }
    synchronize_warp();
  }

  // From what the chunks give to the states that enter them; moves the states past the first `full` chunks.
  LONGVQ_DEVICE void carry(float (&x)[2][kTiles][4], float (&z)[2][kTiles][4], int group, int full) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int64_t mode = group * kScanGroup + n * 4 + lane % 4;
      const Number* powers = decays(warp) + mode * kScanPowers;
      const Pair entry{state(warp)[2 * mode], state(warp)[2 * mode + 1]};
      Pair given[4], last{{0, 0}, {0, 0}};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        given[i] = {Base::number_at(x, n, i), Base::number_at(z, n, i)};
        last = move(powers[1], kSteps, last, given[i]);
      }
      if (lane / 4 == 0) {
        last = move(powers[2], 4 * kSteps, entry, last);
      }
#pragma unroll
      for (int by = 1; by < 8; by *= 2) {
        const Pair before{number_from_below(last.x, by * 4), number_from_below(last.z, by * 4)};
        if (lane / 4 >= by) {
          last = move(powers[by == 1 ? 2 : by == 2 ? 3 : 4], 4.0f * by * kSteps, before, last);
        }
      }
      Pair now{number_from_below(last.x, 4), number_from_below(last.z, 4)};
      now = lane / 4 == 0 ? entry : now;
      synchronize_warp();  // all lanes have read the state that is now replaced
      // The state after all chunks enters none of them.
      if (full == kScanChunks && lane / 4 == 7) {
        keep(mode, last);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (lane / 4 * 4 + i == full) {
          keep(mode, now);
        }
        x[i / 2][n][i % 2 * 2] = now.x.re;
        x[i / 2][n][i % 2 * 2 + 1] = now.x.im;
        z[i / 2][n][i % 2 * 2] = now.z.re;
        z[i / 2][n][i % 2 * 2 + 1] = now.z.im;
        now = move(powers[1], kSteps, now, given[i]);
      }
    }
  }

  LONGVQ_DEVICE void keep(int64_t mode, Pair now) const {
    state(warp)[2 * mode] = now.x;
    state(warp)[2 * mode + 1] = now.z;
  }

  // The steps that don't fill a chunk, one by one.
  LONGVQ_DEVICE void finish_state(int full, int steps) const {
    synchronize_warp();
    for (int64_t mode = lane; mode < p.modes.modes; mode += 32) {
      const Number decay = decays(warp)[mode * kScanPowers];
      Pair now{state(warp)[2 * mode], state(warp)[2 * mode + 1]};
      for (int t = 0; t < steps; ++t) {
        now = move(decay, 1, now, {{Base::value_at(inputs(warp), full, t), 0}, {0, 0}});
      }
      keep(mode, now);
    }
    synchronize_warp();
  }

  // Adds Σ_chunks Q X and Σ_chunks (Q Z + Q' X) of a group of modes.
  LONGVQ_DEVICE void add_products(const float (&x)[2][kTiles][4], const float (&z)[2][kTiles][4], int group) const {
    constexpr int kPair = 2;  // tiles at a time: more take too many registers
#pragma unroll
    for (int first = 0; first < kTiles; first += kPair) {
      Number weight[kPair], decay[kPair];
      float q[2][kPair][4];
      this->multiply_chunks(q, grads(warp), Layout::of_gradients(tables(warp), group, 2), first * 8);
#pragma unroll
      for (int n = 0; n < kPair; ++n) {
        weight[n] = decay[n] = {0, 0};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weight[n] = multiply_add(Base::number_at(q, n, i), Base::number_at(x, first + n, i), weight[n]);
          decay[n] = multiply_add(Base::number_at(q, n, i), Base::number_at(z, first + n, i), decay[n]);
        }
      }
      // Q', in its place.
      this->multiply_chunks(q, grads(warp), Layout::of_gradients(tables(warp), group, 3), first * 8);
#pragma unroll
      for (int n = 0; n < kPair; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          decay[n] = multiply_add(Base::number_at(q, n, i), Base::number_at(x, first + n, i), decay[n]);
        }
        add_sum(group, first + n, 0, weight[n].re);
        add_sum(group, first + n, 1, weight[n].im);
        add_sum(group, first + n, 2, decay[n].re);
        add_sum(group, first + n, 3, decay[n].im);
      }
    }
  }

  // Adds what the lanes of a mode have to one of its sums.
  LONGVQ_DEVICE void add_sum(int group, int n, int which, float value) const {
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
      value += shuffle_xor(value, mask);
    }
    if (lane / 4 == which) {  // one lane of the mode, for each sum another
      sums(warp)[(group * kScanGroup + n * 4 + lane % 4) * kSums + which] += value;
    }
  }

  // Adds gradientsᵀ · inputs over the chunks: rows are steps of the gradients, columns those of the inputs.
  LONGVQ_DEVICE void add_lags() {
#pragma unroll
    for (int k = 0; k < kScanChunks; k += 16) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        uint32_t left[kParts][1][4];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          // Transposed: the lanes' addresses are rows of chunks, eight steps at a time.
          load_matrices_transposed(
              left[part][0], grads(warp).at(part, k + lane % 8 + lane / 16 * 8, 16 * m + lane / 8 % 2 * 8));
        }
        multiply_fragments<Operand>(Base::half_of(lags, m), left, inputs(warp), k, 0);
      }
    }
  }

  // Sums the lag products by lag; every lane has one lag.
  LONGVQ_DEVICE void finish_lags() const {
    float* triangle = reinterpret_cast<float*>(inputs(warp).data);  // where the inputs were
    static_assert(sizeof(float) * kSteps * (kSteps + 1) / 2 <= Chunks::kBytes, "there is room for it");
    synchronize_warp();
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = 16 * m + lane / 4 + half * 8;
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int column = n * 8 + lane % 4 * 2 + c;
            if (column <= row) {
              triangle[(row * (row + 1)) / 2 + column] = lags[m][n][half * 2 + c];
            }
          }
        }
      }
    }
    synchronize_warp();
    double sum = 0;
    for (int row = lane; row < kSteps; ++row) {
      sum += triangle[(row * (row + 1)) / 2 + row - lane];
    }
    lag_sums(warp)[lane] = sum;
    synchronize_warp();
  }

  LONGVQ_DEVICE void write_state() const {
    for (int64_t mode = lane; mode < p.modes.modes; mode += 32) {
      Number* to = segment_states(mode);
      to[0] = state(warp)[2 * mode];
      to[1] = state(warp)[2 * mode + 1];
    }
  }

  // The sums of this segment: those of the chunks, and of the lags with the powers of each mode.
  LONGVQ_DEVICE void write() const {
    const int64_t row = (of.batch * p.segments() + this->segment_of_row()) * p.modes.channels + channel;
    for (int64_t mode = lane; mode < p.modes.modes; mode += 32) {
      const Complex<double> decay = decay_of(p.modes, channel, mode, 1);
      Complex<double> power{1, 0};
      const double* from = sums(warp) + mode * kSums;
      double values[kSums] = {from[0], from[1], from[2], from[3]};
      for (int l = 0; l < kSteps; ++l) {
        const double lag = lag_sums(warp)[l];
        values[0] += power.re * lag;
        values[1] += power.im * lag;
        values[2] += l * power.re * lag;
        values[3] += l * power.im * lag;
        power = multiply_add(power, decay, {0, 0});
      }
      double* to = g.dmodes + (row * p.modes.modes + mode) * kSums;
      const Complex<double> weight = weight_of<double>(p.modes, channel, mode);
      Complex<double> dlog = multiply_add(weight, Complex<double>{values[2], values[3]}, {0, 0});
      if (this->is_last()) {  // whose state depends on log_decay too
        const float* of_state = g.grad_state + this->state_place(mode) * (p.modes.complex_modes ? 2 : 1);
        const Number last = state(warp)[2 * mode + 1];
        const Complex<double> grad{of_state[0], p.modes.complex_modes ? -of_state[1] : 0.0};
        dlog = multiply_add(grad, {last.re, last.im}, dlog);
      }
      to[0] = values[0];
      to[1] = values[1];
      to[2] = dlog.re;
      to[3] = dlog.im;
    }
    if (lane == 0) {
      g.dskip[row] = lag_sums(warp)[0];
    }
  }

  LONGVQ_DEVICE void run(Pass pass) {
    const bool results = pass == Pass::kResults;
    const int64_t size = scan_gradient_table_size(p.modes.modes, kParts);
    this->fill_tables(tables(0), p.tables, size, decays(0));
    start(pass);
    for (int64_t first = begin; first < end; first += kScanTile) {
      __syncthreads();
      this->read({p.u, p.u_batch, p.u_length, p.u_channel}, first, inputs(0));
      if (results) {
        this->read({g.grad, g.grad_batch, g.grad_length, g.grad_channel}, first, grads(0));
      }
      __syncthreads();
      if (has_channel()) {
        const int steps = static_cast<int>(min(end - first, kScanTile)), full = steps / kSteps;
        if (results) {
          add_lags();
        }
        for (int group = 0; group < padded / kScanGroup; ++group) {
          float x[2][kTiles][4], z[2][kTiles][4];
          this->multiply_chunks(x, inputs(warp), Layout::of_gradients(tables(warp), group, 0));
          this->multiply_chunks(z, inputs(warp), Layout::of_gradients(tables(warp), group, 1));
          carry(x, z, group, full);
          if (results) {
            add_products(x, z, group);
          }
        }
        finish_state(full, steps % kSteps);
      }
    }
    __syncthreads();
    if (!has_channel()) {
      return;
    }
    if (results) {
      finish_lags();
      write();
    } else {
      write_state();
    }
  }
};

}  // namespace
}  // namespace longvq::cuda
