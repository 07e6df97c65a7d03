// The state space scan by chunks; see scan_tables.cu for the tables and docs/kernels.md for the design.
//
// Each warp has one channel. Its 32 chunks of 32 steps are the rows of three products on tensor cores. States are
// carried from chunk to chunk in registers in float32: each lane has four consecutive chunks, and the lanes of a mode
// exchange states by shuffles.
//
// The adjoint maps gradients of y to gradients of u. It is the same scan in the other direction with other tables. Its
// state is kept after the decay, so it starts with the gradient of the final state and ends with the gradient of the
// initial state.
#include <initializer_list>

#include "scan_block.h"

namespace longvq::cuda {
namespace {

template <typename Element>
using ScanForwardBlock = ScanBlock<Element, ScanOperand<Element>::kTerms == 1 ? 8 : 2>;

template <typename Element>
struct ScanKernel : ScanForwardBlock<Element> {
  using Base = ScanForwardBlock<Element>;
  using Base::begin, Base::channel, Base::count, Base::end, Base::first_channel, Base::has_channel, Base::lane,
      Base::sequence, Base::p, Base::padded, Base::warp;
  using typename Base::Chunks, typename Base::Layout, typename Base::Operand;
  static constexpr int kTerms = Base::kTerms, kChannels = Base::kChannels, kThreads = Base::kThreads;

  static size_t bytes(int64_t modes) {
    const size_t tables = sizeof(uint16_t) * kChannels * scan_table_size(modes, kTerms);
    const size_t states = sizeof(ComplexFloat) * kChannels * padded_modes(modes) * (kScanPowers + 1);
    return tables + kChannels * Chunks::kBytes + states;
  }

  LONGVQ_DEVICE ScanKernel(const Scan& problem, const Piece& piece) : Base(problem, piece) {}

  // The index of the segment's state in the states of all segments.
  LONGVQ_DEVICE int64_t segment_state_index(int64_t mode) const {
    const int64_t row = sequence.batch * p.modes.channels + channel;
    return (row * p.num_segments() + this->segment_of_row()) * p.modes.modes + mode;
  }

  LONGVQ_DEVICE uint16_t* tables(int c) const {
    return reinterpret_cast<uint16_t*>(shared_memory()) + c * scan_table_size(p.modes.modes, kTerms);
  }
  LONGVQ_DEVICE Chunks chunks(int c) const { return Base::next({tables(kChannels)}, c); }
  LONGVQ_DEVICE ComplexFloat* decays(int c) const {
    return reinterpret_cast<ComplexFloat*>(chunks(kChannels).data) + c * padded * kScanPowers;
  }
  LONGVQ_DEVICE ComplexFloat* state(int c) const { return decays(kChannels) + c * padded; }

  LONGVQ_DEVICE void load_entry_state(Pass pass) const {
    for (int64_t mode = lane; mode < padded; mode += 32) {
      ComplexFloat x{0, 0};
      if (has_channel() && mode < p.modes.modes && pass == Pass::kResults) {
        if (p.segment_states != nullptr) {  // made by enter_segments
          x = reinterpret_cast<const ComplexFloat*>(p.segment_states)[segment_state_index(mode)];
        } else if (p.initial_state != nullptr) {
          x = read_mode<float>(p.modes, p.initial_state, this->state_index(mode));
          x.im = p.adjoint ? -x.im : x.im;
        }
      }
      state(warp)[mode] = x;
    }
  }

  // Outputs replace inputs in shared memory. A 32-bit output takes the room of the terms of its input.
  LONGVQ_DEVICE Element* output(int c, int chunk, int t) const {
    constexpr int kPitch = Chunks::kPitch;
    return reinterpret_cast<Element*>(chunks(c).data) + Base::row_of(chunk) * kPitch + t;
  }

  LONGVQ_DEVICE void write_outputs(int64_t first) const {
    Element* outputs = static_cast<Element*>(p.y) + sequence.batch * p.length * p.modes.channels + first_channel;
    if constexpr (Base::kVectorized) {
      if (this->can_vectorize(outputs, p.modes.channels, 1)) {
        write_vectorized(outputs, first);
        return;
      }
    }
    for (int i = threadIdx.x; i < kScanTile && first + i < end; i += kThreads) {
      const int64_t at = this->position(first + i);
      const bool out = this->ignored(at);
      Element* y = outputs + at * p.modes.channels;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (c < count) {
          const Element value = *output(c, i / kScanSteps, i % kScanSteps);
          y[c] = out ? Element{} : value;
        }
      }
    }
  }

  // Writes all channels of a step in one access, two steps for each lane.
  LONGVQ_DEVICE void write_vectorized(Element* outputs, int64_t first) const {
#pragma unroll
    for (int round = 0; round < Base::kRounds; ++round) {
      const int chunk = this->chunk_of_round(round), t = this->step_of_round();
      uint32_t two[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        two[c] = *reinterpret_cast<const uint32_t*>(output(c, chunk, t));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t step = first + chunk * kScanSteps + t + i, at = this->position(step);
        if (step < end) {
          const bool out = this->ignored(at);
          uint32_t pairs[kChannels / 2];
#pragma unroll
          for (int c = 0; c < kChannels; c += 2) {
            pairs[c / 2] = out ? 0 : Base::same_halves(two[c], two[c + 1], i);
          }
          store_16_bytes(outputs + at * p.modes.channels, pairs);
        }
      }
    }
  }

  // `x`, in: the states that chunks end with when they start from zero; out: the states that chunks start with.
  // Advances the state of the warp past the first `full` chunks.
  LONGVQ_DEVICE void carry(float (&x)[2][kTiles][4], int group, int full) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int64_t mode = group * kScanGroup + n * 4 + lane % 4;
      const ComplexFloat* powers = decays(warp) + mode * kScanPowers;
      const ComplexFloat chunk_decay = powers[1], entry = state(warp)[mode];
      ComplexFloat added[4];
      ComplexFloat last{0, 0};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        added[i] = Base::complex_at(x, n, i);
        last = multiply_add(chunk_decay, last, added[i]);
      }
      if (lane / 4 == 0) {
        last = multiply_add(powers[2], entry, last);
      }
#pragma unroll
      for (int by = 1; by < 8; by *= 2) {
        const ComplexFloat before = shuffle_complex_up(last, by * 4);
        if (lane / 4 >= by) {
          last = multiply_add(powers[by == 1 ? 2 : by == 2 ? 3 : 4], before, last);
        }
      }
      ComplexFloat now = shuffle_complex_up(last, 4);
      now = lane / 4 == 0 ? entry : now;
      synchronize_warp();  // all lanes have read the state, which is replaced now
      // No chunk starts with the state after all chunks.
      if (full == kScanChunks && lane / 4 == 7) {
        state(warp)[mode] = last;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i / 2][n][i % 2 * 2] = now.re;
        x[i / 2][n][i % 2 * 2 + 1] = now.im;
        if (lane / 4 * 4 + i == full) {
          state(warp)[mode] = now;
        }
        now = multiply_add(chunk_decay, now, added[i]);
      }
    }
  }

  // Advances the state past the last steps, which don't fill a chunk, one by one.
  LONGVQ_DEVICE void add_partial_chunk(int full, int steps) const {
    for (int64_t mode = lane; mode < padded; mode += 32) {
      const ComplexFloat decay = decays(warp)[mode * kScanPowers];
      const ComplexFloat weight =
          p.adjoint && mode < p.modes.modes ? weight_of<float>(p.modes, channel, mode) : ComplexFloat{1, 0};
      ComplexFloat x = state(warp)[mode];
      for (int t = 0; t < steps; ++t) {
        const float input = mode < p.modes.modes ? Base::value_at(chunks(warp), full, t) : 0.0f;
        if (p.adjoint) {
          x = multiply_add(decay, multiply_add(weight, {input, 0}, x), {0, 0});
        } else {
          x = multiply_add(decay, x, {input, 0});
        }
      }
      state(warp)[mode] = x;
    }
  }

  LONGVQ_DEVICE void run_tile(int64_t first, Pass pass) const {
    const int steps = static_cast<int>(min(end - first, kScanTile));
    const int full = steps / static_cast<int>(kScanSteps);
    float y[2][kTiles][4] = {};
    if (pass == Pass::kResults) {
      const auto inside = Layout::inside(tables(warp));
      uint32_t u[kTerms][2][4];
      this->load_chunks(u, chunks(warp), 0);
      multiply_fragments<Operand>(y, u, inside, 0, 0);
      // The last 16 steps of a chunk reach only its last 16 outputs, by the same 16 rows of K.
      this->load_chunks(u, chunks(warp), 16);
      float later[2][kTiles / 2][4] = {};
      multiply_fragments<Operand>(later, u, inside, 0, 0);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int i = 0; i < kTiles / 2 * 4; ++i) {
          y[m][kTiles / 2 + i / 4][i % 4] += later[m][i / 4][i % 4];
        }
      }
    }
    for (int group = 0; group < padded / kScanGroup; ++group) {
      float x[2][kTiles][4];
      this->multiply_chunks(x, chunks(warp), Layout::in(tables(warp), group));
      carry(x, group, full);
      if (pass == Pass::kResults) {
#pragma unroll
        for (int k = 0; k < kTiles; k += 2) {
          uint32_t left[kTerms][2][4];
          set_left<Operand>(left, 0, x[0][k], x[0][k + 1]);
          set_left<Operand>(left, 1, x[1][k], x[1][k + 1]);
          multiply_fragments<Operand>(y, left, Layout::out(tables(warp), group), k * 8, 0);
        }
      }
    }
    synchronize_warp();
    add_partial_chunk(full, steps % static_cast<int>(kScanSteps));
    synchronize_warp();  // all inputs have been read, so outputs may replace them
    if (pass == Pass::kResults) {
      Base::for_each_pair([&](int m, int n, int half) {
        const int chunk = lane / 4 * 4 + 2 * m + half;
        store_pair(output(warp, chunk, n * 8 + lane % 4 * 2), y[m][n][half * 2], y[m][n][half * 2 + 1]);
      });
    }
  }

  LONGVQ_DEVICE void write_state(Pass pass) const {
    for (int64_t mode = lane; has_channel() && mode < p.modes.modes; mode += 32) {
      const ComplexFloat x = state(warp)[mode];
      if (pass == Pass::kStates) {
        reinterpret_cast<ComplexFloat*>(p.segment_states)[segment_state_index(mode)] = x;
      } else if (this->is_last()) {
        float* to = p.final_state + this->state_index(mode) * (p.modes.complex_modes ? 2 : 1);
        to[0] = x.re;
        if (p.modes.complex_modes) {
          to[1] = p.adjoint ? -x.im : x.im;
        }
      }
    }
  }

  LONGVQ_DEVICE void run(Pass pass) const {
    this->fill_tables(tables(0), p.tables, scan_table_size(p.modes.modes, kTerms), decays(0));
    load_entry_state(pass);
    for (int64_t first = begin; first < end; first += kScanTile) {
      __syncthreads();
      this->read(p.u, p.u_strides, first, chunks(0));
      __syncthreads();
      if (has_channel()) {
        run_tile(first, pass);
      }
      __syncthreads();
      if (pass == Pass::kResults) {
        write_outputs(first);
      }
    }
    synchronize_warp();
    write_state(pass);
  }
};

template <typename Element>
__global__ void __launch_bounds__(ScanForwardBlock<Element>::kThreads, 1) scan(Scan p, Pass pass) {
  const Piece piece = piece_of(p, p.segment_length, blockIdx.z, blockIdx.y);
  const ScanKernel<Element> kernel(p, piece);
  if (piece.exists(p.segment_length) && !(pass == Pass::kStates && kernel.is_last())) {
    kernel.run(pass);
  }
}

// In: the states that segments end with when they start from zero. Out: the states that segments start with. One thread
// for each mode of a sequence.
__global__ void __launch_bounds__(128) enter_segments(Scan p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, modes = p.modes.modes;
  if (i >= p.num_sequences() * p.modes.channels * modes) {
    return;
  }
  const int64_t mode = i % modes, row = i / modes, channel = row % p.modes.channels;
  const Complex<double> exact = decay_of(p.modes, channel, mode, static_cast<double>(p.segment_length));
  const ComplexFloat decay{static_cast<float>(exact.re), static_cast<float>(exact.im)};
  const Sequence sequence = sequence_of(p, row / p.modes.channels);
  ComplexFloat x{0, 0};
  if (p.initial_state != nullptr) {
    x = read_mode<float>(p.modes, p.initial_state, i);
    x.im = p.adjoint ? -x.im : x.im;
  }
  const int64_t first =
      (sequence.batch * p.modes.channels + channel) * p.num_segments() + sequence.first_piece(p, p.segment_length);
  ComplexFloat* states = reinterpret_cast<ComplexFloat*>(p.segment_states) + first * modes + mode;
  for (int64_t segment = 0; segment == 0 || segment * p.segment_length < sequence.length; ++segment) {
    const bool last = (segment + 1) * p.segment_length >= sequence.length;
    const ComplexFloat left = last ? ComplexFloat{0, 0} : states[segment * modes];
    states[segment * modes] = x;
    x = multiply_add(decay, x, left);
  }
}

}  // namespace

int longvq_cuda_scan(const Scan* problem, void* stream) {
  const Scan& p = *problem;
  if (p.modes.modes > kScanMaxModes || p.batch > kMaxGrid || p.num_segments() > kMaxGrid) {
    return kUnsupported;
  }
  if (p.batch == 0 || p.modes.channels == 0 || p.length == 0) {
    return 0;
  }
  return for_dtype(p.type, [&](auto element) {
    using S = ScanKernel<decltype(element)>;
    constexpr auto kernel = scan<decltype(element)>;
    return run_segments<kernel, enter_segments, S>(p, p, p.segment_states, S::bytes(p.modes.modes), stream);
  });
}

}  // namespace longvq::cuda
