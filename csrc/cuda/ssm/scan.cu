// The state space scan by chunks, see scan_tables.cu for the tables and docs/kernels.md for the design.
//
// A warp has one channel, whose 32 chunks of 32 steps are the rows of three products on tensor cores. States are
// carried from chunk to chunk in registers in float32: a lane has four chunks that follow each other, and the lanes of
// a mode pass on what they have by shuffles.
//
// Its adjoint maps gradients of y to those of u. It is the same scan the other way with other tables; its state is what
// has been decayed already, so that it begins with the gradient of the last state and ends with that of the first.
#include <initializer_list>

#include "scan_block.h"

namespace longvq::cuda {
namespace {

template <typename Element>
using ScanningBlock = ScanBlock<Element, ScanOperand<Element>::kParts == 1 ? 8 : 2>;

template <typename Element>
struct Scanning : ScanningBlock<Element> {
  using Base = ScanningBlock<Element>;
  using Base::begin, Base::channel, Base::count, Base::end, Base::first_channel, Base::has_channel, Base::lane,
      Base::of, Base::p, Base::padded, Base::warp;
  using typename Base::Chunks, typename Base::Layout, typename Base::Operand;
  static constexpr int kParts = Base::kParts, kChannels = Base::kChannels, kThreads = Base::kThreads;

  static size_t bytes(int64_t modes) {
    const size_t tables = sizeof(uint16_t) * kChannels * scan_table_size(modes, kParts);
    const size_t states = sizeof(Number) * kChannels * padded_modes(modes) * (kScanPowers + 1);
    return tables + kChannels * Chunks::kBytes + states;
  }

  LONGVQ_DEVICE Scanning(const Scan& problem, const Piece& piece) : Base(problem, piece) {}

  // The place of the segment's state in an array of those of all.
  LONGVQ_DEVICE int64_t segment_place(int64_t mode) const {
    const int64_t row = of.batch * p.modes.channels + channel;
    return (row * p.segments() + this->segment_of_row()) * p.modes.modes + mode;
  }

  LONGVQ_DEVICE uint16_t* tables(int of) const {
    return reinterpret_cast<uint16_t*>(shared_memory()) + of * scan_table_size(p.modes.modes, kParts);
  }
  LONGVQ_DEVICE Chunks chunks(int of) const { return Base::next({tables(kChannels)}, of); }
  LONGVQ_DEVICE Number* decays(int of) const {
    return reinterpret_cast<Number*>(chunks(kChannels).data) + of * padded * kScanPowers;
  }
  LONGVQ_DEVICE Number* state(int of) const { return decays(kChannels) + of * padded; }

  LONGVQ_DEVICE void start_state(Pass pass) const {
    for (int64_t mode = lane; mode < padded; mode += 32) {
      Number x{0, 0};
      if (has_channel() && mode < p.modes.modes && pass == Pass::kResults) {
        if (p.segment_states != nullptr) {  // entry states, made of those of the pass before
          x = reinterpret_cast<const Number*>(p.segment_states)[segment_place(mode)];
        } else if (p.initial_state != nullptr) {
          const float* from = p.initial_state + this->state_place(mode) * (p.modes.complex_modes ? 2 : 1);
          x = {from[0], p.modes.complex_modes ? (p.adjoint ? -from[1] : from[1]) : 0.0f};
        }
      }
      state(warp)[mode] = x;
    }
  }

  // y is left where u was: rows of 16 bits, or of 32 bits in the room of three parts.
  LONGVQ_DEVICE Element* output(int of, int chunk, int t) const {
    constexpr int kPitch = Chunks::kPitch;
    return reinterpret_cast<Element*>(chunks(of).data) + Base::row_of(chunk) * kPitch + t;
  }

  LONGVQ_DEVICE void write_outputs(int64_t first) const {
    Element* outputs = static_cast<Element*>(p.y) + of.batch * p.length * p.modes.channels + first_channel;
    if constexpr (Base::kTogether) {
      if (this->are_together(outputs, p.modes.channels, 1)) {
        write_together(outputs, first);
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

  // The channels of a step at once, two steps a lane.
  LONGVQ_DEVICE void write_together(Element* outputs, int64_t first) const {
#pragma unroll
    for (int round = 0; round < Base::kRounds; ++round) {
      const int chunk = this->chunk_of_round(round), t = this->first_of_round();
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
          uint32_t numbers[kChannels / 2];
#pragma unroll
          for (int c = 0; c < kChannels; c += 2) {
            numbers[c / 2] = out ? 0 : Base::same_halves(two[c], two[c + 1], i);
          }
          store_together(outputs + at * p.modes.channels, numbers);
        }
      }
    }
  }

  // From what the chunks give to the states that enter them; moves the state past the first `full` chunks.
  LONGVQ_DEVICE void carry(float (&x)[2][kTiles][4], int group, int full) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int64_t mode = group * kScanGroup + n * 4 + lane % 4;
      const Number* powers = decays(warp) + mode * kScanPowers;
      const Number once = powers[1], entry = state(warp)[mode];
      Number given[4];
      Number last{0, 0};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        given[i] = Base::number_at(x, n, i);
        last = multiply_add(once, last, given[i]);
      }
      if (lane / 4 == 0) {
        last = multiply_add(powers[2], entry, last);
      }
#pragma unroll
      for (int by = 1; by < 8; by *= 2) {
        const Number before = number_from_below(last, by * 4);
        if (lane / 4 >= by) {
          last = multiply_add(powers[by == 1 ? 2 : by == 2 ? 3 : 4], before, last);
        }
      }
      Number now = number_from_below(last, 4);
      now = lane / 4 == 0 ? entry : now;
      synchronize_warp();  // all lanes have read the state that is now replaced
      // The state after all chunks enters none of them.
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
        now = multiply_add(once, now, given[i]);
      }
    }
  }

  // The steps that don't fill a chunk, one by one.
  LONGVQ_DEVICE void finish_state(int full, int steps) const {
    for (int64_t mode = lane; mode < padded; mode += 32) {
      const Number decay = decays(warp)[mode * kScanPowers];
      const Number weight = p.adjoint && mode < p.modes.modes ? weight_of<float>(p.modes, channel, mode) : Number{1, 0};
      Number x = state(warp)[mode];
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
      uint32_t u[kParts][2][4];
      this->load_chunks(u, chunks(warp), 0);
      multiply_fragments<Operand>(y, u, inside, 0, 0);
      this->load_chunks(u, chunks(warp), 16);  // of these outputs start 16 steps later, and look 16 less far back
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
          uint32_t left[kParts][2][4];
          set_left<Operand>(left, 0, x[0][k], x[0][k + 1]);
          set_left<Operand>(left, 1, x[1][k], x[1][k + 1]);
          multiply_fragments<Operand>(y, left, Layout::out(tables(warp), group), k * 8, 0);
        }
      }
    }
    synchronize_warp();
    finish_state(full, steps % static_cast<int>(kScanSteps));
    synchronize_warp();  // inputs are read, outputs may take their place
    if (pass == Pass::kResults) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int chunk = lane / 4 * 4 + 2 * m + half;
            store_pair(output(warp, chunk, n * 8 + lane % 4 * 2), y[m][n][half * 2], y[m][n][half * 2 + 1]);
          }
        }
      }
    }
  }

  LONGVQ_DEVICE void write_state(Pass pass) const {
    for (int64_t mode = lane; has_channel() && mode < p.modes.modes; mode += 32) {
      const Number x = state(warp)[mode];
      if (pass == Pass::kStates) {
        reinterpret_cast<Number*>(p.segment_states)[segment_place(mode)] = x;
      } else if (this->is_last()) {
        float* to = p.final_state + this->state_place(mode) * (p.modes.complex_modes ? 2 : 1);
        to[0] = x.re;
        if (p.modes.complex_modes) {
          to[1] = p.adjoint ? -x.im : x.im;
        }
      }
    }
  }

  LONGVQ_DEVICE void run(Pass pass) const {
    this->fill_tables(tables(0), p.tables, scan_table_size(p.modes.modes, kParts), decays(0));
    start_state(pass);
    for (int64_t first = begin; first < end; first += kScanTile) {
      __syncthreads();
      this->read({p.u, p.u_batch, p.u_length, p.u_channel}, first, chunks(0));
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
__global__ void __launch_bounds__(ScanningBlock<Element>::kThreads, 1) scan(Scan p, Pass pass) {
  const Piece piece = piece_of(p, p.segment_length, blockIdx.z, blockIdx.y);
  const Scanning<Element> scanning(p, piece);
  if (piece.there(p.segment_length) && !(pass == Pass::kStates && scanning.is_last())) {
    scanning.run(pass);
  }
}

// From the states that segments leave, starting from zero, to those that enter them.
__global__ void __launch_bounds__(128) enter_segments(Scan p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, modes = p.modes.modes;
  if (i >= p.sequences() * p.modes.channels * modes) {
    return;
  }
  const int64_t mode = i % modes, row = i / modes, channel = row % p.modes.channels;
  const Complex<double> exact = decay_of(p.modes, channel, mode, static_cast<double>(p.segment_length));
  const Number decay{static_cast<float>(exact.re), static_cast<float>(exact.im)};
  const Sequence of = sequence_of(p, row / p.modes.channels);
  const int width = p.modes.complex_modes ? 2 : 1;
  Number x{0, 0};
  if (p.initial_state != nullptr) {
    const float imaginary = p.modes.complex_modes ? p.initial_state[i * width + 1] : 0.0f;
    x = {p.initial_state[i * width], p.adjoint ? -imaginary : imaginary};
  }
  const int64_t first = (of.batch * p.modes.channels + channel) * p.segments() + of.first_piece(p, p.segment_length);
  Number* states = reinterpret_cast<Number*>(p.segment_states) + first * modes + mode;
  for (int64_t segment = 0; segment == 0 || segment * p.segment_length < of.length; ++segment) {
    const bool last = (segment + 1) * p.segment_length >= of.length;
    const Number left = last ? Number{0, 0} : states[segment * modes];
    states[segment * modes] = x;
    x = multiply_add(decay, x, left);
  }
}

}  // namespace

int longvq_cuda_scan(const Scan* problem, void* stream) {
  const Scan& p = *problem;
  if (p.modes.modes > kScanMaxModes || p.batch > kMaxGrid || p.segments() > kMaxGrid) {
    return kNotCovered;
  }
  if (p.batch == 0 || p.modes.channels == 0 || p.length == 0) {
    return 0;
  }
  return for_element(p.type, [&](auto element) {
    using S = Scanning<decltype(element)>;
    constexpr auto kernel = scan<decltype(element)>;
    return run_segments<kernel, enter_segments, S>(p, p, p.segment_states, S::bytes(p.modes.modes), stream);
  });
}

}  // namespace longvq::cuda
