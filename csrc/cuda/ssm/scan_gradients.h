// Gradients of the scan's parameters, computed from the inputs again, without stored states.
//
// Let x be the state, z its derivative by log_decay, and g the gradient of y. Then
//
//     dL/dw = Σ_t g_t x_t        dL/dlog_decay = w Σ_t g_t z_t
//
// Let X and Z be the state and its derivative at the start of a chunk. By chunks, these sums are
//
//     Σ_l λ^l c_l + Σ_chunks Q X        w (Σ_l l λ^l c_l + Σ_chunks (Q Z + Q' X))
//
// with lag products c_l = Σ g_t u_{t−l} inside chunks, Q = Σ_t λ^(t+1) g_t and Q' = Σ_t (t+1) λ^(t+1) g_t. Tensor cores
// multiply the chunks by four tables, and the gradients by the inputs of all chunks.
#pragma once

#include "scan_block.h"

namespace longvq::cuda {
namespace {

// Four tables for each group of modes leave shared memory for at most half as many channels as in the scan.
template <typename Element>
using ScanGradientBlock = ScanBlock<Element, ScanOperand<Element>::kTerms == 1 ? 4 : 2>;

// The state and its derivative by log_decay.
struct DualState {
  ComplexFloat x, z;
};

// The state `steps` steps later, where power = λ^steps, plus `added`.
LONGVQ_DEVICE DualState advance(ComplexFloat power, float steps, DualState from, DualState added) {
  const ComplexFloat z{from.z.re + steps * from.x.re, from.z.im + steps * from.x.im};
  return {multiply_add(power, from.x, added.x), multiply_add(power, z, added.z)};
}

template <typename Element>
struct ScanGradientKernel : ScanGradientBlock<Element> {
  using Base = ScanGradientBlock<Element>;
  using Base::begin, Base::channel, Base::end, Base::has_channel, Base::lane, Base::sequence, Base::p, Base::padded,
      Base::warp;
  using typename Base::Chunks, typename Base::Layout, typename Base::Operand;
  static constexpr int kTerms = Base::kTerms, kChannels = Base::kChannels, kThreads = Base::kThreads;
  static constexpr int kSteps = kScanSteps, kSums = 4;  // for each mode: of weight and log_decay, real and imaginary

  const ScanGradients& g;
  float lags[2][kTiles][4] = {};  // Σ g_s u_t of all chunks so far, by step s and step t of a chunk

  LONGVQ_DEVICE ScanGradientKernel(const ScanGradients& problem, const Piece& piece)
      : Base(problem.scan, piece), g(problem) {}

  static size_t bytes(int64_t modes) {
    const size_t tables = sizeof(uint16_t) * kChannels * scan_gradient_table_size(modes, kTerms);
    const size_t states = sizeof(ComplexFloat) * kChannels * padded_modes(modes) * (kScanPowers + 2);
    const size_t sums = sizeof(double) * kChannels * (padded_modes(modes) * kSums + kSteps);
    return tables + 2 * kChannels * Chunks::kBytes + states + sums;
  }

  LONGVQ_DEVICE uint16_t* tables(int c) const {
    return reinterpret_cast<uint16_t*>(shared_memory()) + c * scan_gradient_table_size(p.modes.modes, kTerms);
  }
  LONGVQ_DEVICE Chunks inputs(int c) const { return Base::next({tables(kChannels)}, c); }
  LONGVQ_DEVICE Chunks grads(int c) const { return inputs(kChannels + c); }
  LONGVQ_DEVICE double* sums(int c) const {
    return reinterpret_cast<double*>(inputs(2 * kChannels).data) + c * (padded * kSums + kSteps);
  }
  LONGVQ_DEVICE double* lag_sums(int c) const { return sums(c) + padded * kSums; }
  LONGVQ_DEVICE ComplexFloat* decays(int c) const {
    return reinterpret_cast<ComplexFloat*>(sums(kChannels)) + c * padded * kScanPowers;
  }
  // State and derivative of each mode, in turn.
  LONGVQ_DEVICE ComplexFloat* state(int c) const { return decays(kChannels) + c * padded * 2; }

  LONGVQ_DEVICE ComplexFloat* segment_states(int64_t mode) const {
    const int64_t row = sequence.batch * p.modes.channels + channel;
    return reinterpret_cast<ComplexFloat*>(g.segment_states) +
           ((row * p.num_segments() + this->segment_of_row()) * p.modes.modes + mode) * 2;
  }

  LONGVQ_DEVICE void load_entry_state(Pass pass) const {
    for (int64_t i = lane; i < padded * kSums + kSteps; i += 32) {
      sums(warp)[i] = 0;
    }
    for (int64_t mode = lane; mode < padded; mode += 32) {
      DualState entry{{0, 0}, {0, 0}};
      if (has_channel() && mode < p.modes.modes && pass == Pass::kResults) {
        if (g.segment_states != nullptr) {
          const ComplexFloat* from = segment_states(mode);
          entry = {from[0], from[1]};
        } else if (p.initial_state != nullptr) {
          entry.x = read_mode<float>(p.modes, p.initial_state, this->state_index(mode));
        }
      }
      store_state(mode, entry);
    }
    synchronize_warp();
  }

  // In: the states and derivatives that chunks end with when they start from zero. Out: the states and derivatives that
  // chunks start with. Advances the state of the warp past the first `full` chunks.
  LONGVQ_DEVICE void carry(float (&x)[2][kTiles][4], float (&z)[2][kTiles][4], int group, int full) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int64_t mode = group * kScanGroup + n * 4 + lane % 4;
      const ComplexFloat* powers = decays(warp) + mode * kScanPowers;
      const DualState entry{state(warp)[2 * mode], state(warp)[2 * mode + 1]};
      DualState added[4], last{{0, 0}, {0, 0}};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        added[i] = {Base::complex_at(x, n, i), Base::complex_at(z, n, i)};
        last = advance(powers[1], kSteps, last, added[i]);
      }
      if (lane / 4 == 0) {
        last = advance(powers[2], 4 * kSteps, entry, last);
      }
#pragma unroll
      for (int by = 1; by < 8; by *= 2) {
        const DualState before{shuffle_complex_up(last.x, by * 4), shuffle_complex_up(last.z, by * 4)};
        if (lane / 4 >= by) {
          last = advance(powers[by == 1 ? 2 : by == 2 ? 3 : 4], 4.0f * by * kSteps, before, last);
        }
      }
      DualState now{shuffle_complex_up(last.x, 4), shuffle_complex_up(last.z, 4)};
      now = lane / 4 == 0 ? entry : now;
      synchronize_warp();  // all lanes have read the state, which is replaced now
      // No chunk starts with the state after all chunks.
      if (full == kScanChunks && lane / 4 == 7) {
        store_state(mode, last);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (lane / 4 * 4 + i == full) {
          store_state(mode, now);
        }
        x[i / 2][n][i % 2 * 2] = now.x.re;
        x[i / 2][n][i % 2 * 2 + 1] = now.x.im;
        z[i / 2][n][i % 2 * 2] = now.z.re;
        z[i / 2][n][i % 2 * 2 + 1] = now.z.im;
        now = advance(powers[1], kSteps, now, added[i]);
      }
    }
  }

  LONGVQ_DEVICE void store_state(int64_t mode, DualState now) const {
    state(warp)[2 * mode] = now.x;
    state(warp)[2 * mode + 1] = now.z;
  }

  // Advances the state past the last steps, which don't fill a chunk, one by one.
  LONGVQ_DEVICE void add_partial_chunk(int full, int steps) const {
    synchronize_warp();
    for (int64_t mode = lane; mode < p.modes.modes; mode += 32) {
      const ComplexFloat decay = decays(warp)[mode * kScanPowers];
      DualState now{state(warp)[2 * mode], state(warp)[2 * mode + 1]};
      for (int t = 0; t < steps; ++t) {
        now = advance(decay, 1, now, {{Base::value_at(inputs(warp), full, t), 0}, {0, 0}});
      }
      store_state(mode, now);
    }
    synchronize_warp();
  }

  // Adds Σ_chunks Q X and Σ_chunks (Q Z + Q' X) of a group of modes.
  LONGVQ_DEVICE void add_products(const float (&x)[2][kTiles][4], const float (&z)[2][kTiles][4], int group) const {
    constexpr int kPair = 2;  // fragments at a time: more take too many registers
#pragma unroll
    for (int first = 0; first < kTiles; first += kPair) {
      ComplexFloat weight[kPair], decay[kPair];
      float q[2][kPair][4];
      this->multiply_chunks(q, grads(warp), Layout::of_gradients(tables(warp), group, 2), first * 8);
#pragma unroll
      for (int n = 0; n < kPair; ++n) {
        weight[n] = decay[n] = {0, 0};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weight[n] = multiply_add(Base::complex_at(q, n, i), Base::complex_at(x, first + n, i), weight[n]);
          decay[n] = multiply_add(Base::complex_at(q, n, i), Base::complex_at(z, first + n, i), decay[n]);
        }
      }
      // Q', which replaces Q.
      this->multiply_chunks(q, grads(warp), Layout::of_gradients(tables(warp), group, 3), first * 8);
#pragma unroll
      for (int n = 0; n < kPair; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          decay[n] = multiply_add(Base::complex_at(q, n, i), Base::complex_at(x, first + n, i), decay[n]);
        }
        add_sum(group, first + n, 0, weight[n].re);
        add_sum(group, first + n, 1, weight[n].im);
        add_sum(group, first + n, 2, decay[n].re);
        add_sum(group, first + n, 3, decay[n].im);
      }
    }
  }

  // Adds `value` of all lanes of a mode to one of the mode's sums.
  LONGVQ_DEVICE void add_sum(int group, int n, int which, float value) const {
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
      value += shuffle_xor(value, mask);
    }
    if (lane / 4 == which) {  // one lane of the mode, a different one for each sum
      sums(warp)[(group * kScanGroup + n * 4 + lane % 4) * kSums + which] += value;
    }
  }

  // lags += gradientsᵀ · inputs, where rows of both are chunks.
  LONGVQ_DEVICE void add_lags() {
#pragma unroll
    for (int k = 0; k < kScanChunks; k += 16) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        uint32_t left[kTerms][1][4];
#pragma unroll
        for (int term = 0; term < kTerms; ++term) {
          // A transposed load: lanes give the addresses of chunks, eight steps at a time.
          load_matrices_transposed(
              left[term][0], grads(warp).at(term, k + lane % 8 + lane / 16 * 8, 16 * m + lane / 8 % 2 * 8));
        }
        multiply_fragments<Operand>(Base::half_of(lags, m), left, inputs(warp), k, 0);
      }
    }
  }

  // Sums the lag products of each lag. Lane l sums lag l.
  LONGVQ_DEVICE void finish_lags() const {
    float* triangle = reinterpret_cast<float*>(inputs(warp).data);  // replaces the inputs
    static_assert(sizeof(float) * kSteps * (kSteps + 1) / 2 <= Chunks::kBytes, "the triangle fits");
    synchronize_warp();
    Base::for_each_pair([&](int m, int n, int half) {
      const int row = 16 * m + lane / 4 + half * 8;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = n * 8 + lane % 4 * 2 + c;
        if (column <= row) {
          triangle[(row * (row + 1)) / 2 + column] = lags[m][n][half * 2 + c];
        }
      }
    });
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
      ComplexFloat* to = segment_states(mode);
      to[0] = state(warp)[2 * mode];
      to[1] = state(warp)[2 * mode + 1];
    }
  }

  // Writes the sums of this segment: the sums over chunks, plus the lag products times the powers of the decay.
  LONGVQ_DEVICE void write() const {
    const int64_t row = (sequence.batch * p.num_segments() + this->segment_of_row()) * p.modes.channels + channel;
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
      if (this->is_last()) {  // the final state depends on log_decay too
        const ComplexFloat last = state(warp)[2 * mode + 1];
        const Complex<double> grad = read_mode<double>(p.modes, g.grad_state, this->state_index(mode));
        dlog = multiply_add({grad.re, -grad.im}, {last.re, last.im}, dlog);
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
    const int64_t size = scan_gradient_table_size(p.modes.modes, kTerms);
    this->fill_tables(tables(0), p.tables, size, decays(0));
    load_entry_state(pass);
    for (int64_t first = begin; first < end; first += kScanTile) {
      __syncthreads();
      this->read(p.u, p.u_strides, first, inputs(0));
      if (results) {
        this->read(g.grad, g.grad_strides, first, grads(0));
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
        add_partial_chunk(full, steps % kSteps);
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
