// What the scan and the gradients of its parameters share. Each warp has one channel, and kScanTile of its steps at a
// time in shared memory.
#pragma once

#include "../common/dispatch.h"
#include "../common/pieces.h"
#include "complex_modes.h"
#include "table_layout.h"

namespace longvq::cuda {
namespace {

using ComplexFloat = Complex<float>;

// What a pass over a segment computes: the state that it ends with when it starts from zero, or results.
enum class Pass { kStates, kResults };
constexpr int kTiles = kScanSteps / 8;  // result fragments (16, 8) side by side

template <typename Element, int CHANNELS>
struct ScanBlock {
  using Operand = ScanOperand<Element>;
  using Layout = ScanLayout<Operand::kTerms>;
  using Chunks = typename Layout::Chunks;
  static constexpr int kTerms = Operand::kTerms;
  static constexpr int kChannels = CHANNELS;  // one for each warp
  static constexpr int kThreads = 32 * kChannels;

  const Scan& p;
  Sequence sequence;
  int64_t segment, first_channel, channel, begin, end;  // steps, in the order of the scan
  int64_t padded;                                       // modes
  int count;                                            // channels in this block
  int warp, lane;

  LONGVQ_DEVICE ScanBlock(const Scan& problem, const Piece& piece)
      : p(problem), sequence(piece.sequence), segment(piece.index) {
    first_channel = static_cast<int64_t>(blockIdx.x) * kChannels;
    count = static_cast<int>(min(p.modes.channels - first_channel, int64_t{kChannels}));
    begin = segment * p.segment_length;
    end = min(begin + p.segment_length, sequence.length);
    padded = padded_modes(p.modes.modes);
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    channel = first_channel + warp;
  }

  LONGVQ_DEVICE bool has_channel() const { return warp < count; }
  LONGVQ_DEVICE int64_t position(int64_t step) const {
    return sequence.start + (p.reverse ? sequence.length - 1 - step : step);
  }
  LONGVQ_DEVICE bool ignored(int64_t at) const { return p.mask.ignores(sequence.batch, at); }
  // The index of the segment among the segments of its row of the tensors.
  LONGVQ_DEVICE int64_t segment_of_row() const { return sequence.first_piece(p, p.segment_length) + segment; }
  // The state of the last segment of a sequence enters no other segment.
  LONGVQ_DEVICE bool is_last() const { return end == sequence.length; }
  LONGVQ_DEVICE int64_t state_index(int64_t mode) const {
    return (sequence.number * p.modes.channels + channel) * p.modes.modes + mode;
  }

  // Copies the tables, `size` numbers for each channel, and the powers of the decays.
  LONGVQ_DEVICE void fill_tables(uint16_t* tables, const uint16_t* from, int64_t size, ComplexFloat* decays) const {
    for (int64_t i = threadIdx.x * 8; i < count * size; i += kThreads * 8) {
      copy_async(tables + i, from + first_channel * size + i, 16);
    }
    commit_copies();
    const auto* powers = reinterpret_cast<const ComplexFloat*>(p.decays) + first_channel * padded * kScanPowers;
    for (int64_t i = threadIdx.x; i < count * padded * kScanPowers; i += kThreads) {
      decays[i] = powers[i];
    }
    wait_for_copies<0>();
  }

  // Reads steps first .. first + kScanTile of all channels of the block from a tensor (B, L, H) into shared memory,
  // from `chunks` of the first channel on. Ignored and missing steps become zero.
  LONGVQ_DEVICE void read(const void* data, const ScanStrides& strides, int64_t first, const Chunks& chunks) const {
    const auto* from =
        static_cast<const Element*>(data) + sequence.batch * strides.batch + first_channel * strides.channel;
    if constexpr (kVectorized) {
      if (can_vectorize(from, strides.length, strides.channel)) {
        read_vectorized(from, strides.length, first, chunks);
        return;
      }
    }
    for (int i = threadIdx.x; i < kScanTile; i += kThreads) {
      const int64_t at = position(first + i);
      const bool valid = first + i < end && !ignored(at);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        uint16_t terms[kTerms];
        Operand::split(valid && c < count ? to_float(from[at * strides.length + c * strides.channel]) : 0.0f, terms);
#pragma unroll
        for (int term = 0; term < kTerms; ++term) {
          *next(chunks, c).at(term, row_of(i / kScanSteps), i % kScanSteps) = terms[term];
        }
      }
    }
  }
  // Whether one access can take all channels of a step.
  static constexpr bool kVectorized = kTerms == 1 && sizeof(Element) == sizeof(uint16_t);
  struct alignas(sizeof(uint16_t) * kChannels) ChannelVector {
    uint32_t pairs[kChannels / 2];
  };
  LONGVQ_DEVICE bool can_vectorize(const Element* first, int64_t length_stride, int64_t channel_stride) const {
    return kVectorized && count == kChannels && channel_stride == 1 && length_stride % kChannels == 0 &&
           reinterpret_cast<uintptr_t>(first) % sizeof(ChannelVector) == 0;
  }

  // In vectorized access, a lane takes two steps of a chunk in each of kRounds rounds. The two halves of a warp take
  // chunks whose rows lie in different banks.
  static constexpr int kRounds = kScanTile / kThreads / 2;
  LONGVQ_DEVICE int chunk_of_round(int round) const { return round * kChannels + warp + lane / 16 * 16; }
  LONGVQ_DEVICE int step_of_round() const { return lane % 16 * 2; }

  LONGVQ_DEVICE void read_vectorized(const Element* from, int64_t stride, int64_t first, const Chunks& chunks) const {
    ChannelVector held[kRounds][2];  // all loads start before the first result is used
    uint32_t masks[kRounds][2];
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t step = first + chunk_of_round(round) * kScanSteps + step_of_round() + i, at = position(step);
        held[round][i] = {};
        masks[round][i] = 0;
        if (step < end) {
          held[round][i] = *reinterpret_cast<const ChannelVector*>(from + at * stride);
          masks[round][i] = p.mask.at(sequence.batch, at);
        }
      }
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        uint32_t two[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          two[i] = masks[round][i] != 0 ? 0 : held[round][i].pairs[c / 2];
        }
        uint16_t* to = next(chunks, c).at(0, row_of(chunk_of_round(round)), step_of_round());
        *reinterpret_cast<uint32_t*>(to) = same_halves(two[0], two[1], c % 2);
      }
    }
  }
  // Joins the low halves of two words, or their high halves.
  LONGVQ_DEVICE static uint32_t same_halves(uint32_t first, uint32_t second, int high) {
    return high == 0 ? (first & 0xffff) | second << 16 : first >> 16 | (second & 0xffff0000);
  }
  // The chunks of the channel `by` channels later.
  LONGVQ_DEVICE static Chunks next(const Chunks& chunks, int by) {
    return {chunks.data + by * (Chunks::kBytes / sizeof(uint16_t))};
  }

  // The sum of the terms of a number in a tile.
  LONGVQ_DEVICE static float value_at(const Chunks& chunks, int chunk, int t) {
    float value = 0;
#pragma unroll
    for (int term = kTerms - 1; term >= 0; --term) {
      value += from_bits(static_cast<uint32_t>(*chunks.at(term, row_of(chunk), t)) << 16);
    }
    return value;
  }

  // The row of a chunk in the products: chunk 4 g + 2 m + half is row 16 m + 8 half + g, so that each lane has four
  // consecutive chunks. It is also the row in a tile, so that rows which are loaded together lie in different banks.
  LONGVQ_DEVICE static int row_of(int chunk) { return chunk % 4 * 8 + chunk / 4; }

  LONGVQ_DEVICE void load_chunks(uint32_t (&out)[kTerms][2][4], const Chunks& chunks, int step) const {
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_left(out[term][m], chunks, term, 16 * m, step);
      }
    }
  }

  // Half m of the rows of a product.
  template <int NTILES>
  LONGVQ_DEVICE static float (&half_of(float (&x)[2][NTILES][4], int m))[1][NTILES][4] {
    return reinterpret_cast<float (&)[1][NTILES][4]>(x[m]);
  }

  // out = chunks · table, for the columns of the table from `column`.
  template <int NTILES>
  LONGVQ_DEVICE void multiply_chunks(
      float (&out)[2][NTILES][4], const Chunks& chunks, const typename Layout::Table& table, int column = 0) const {
#pragma unroll
    for (int i = 0; i < 2 * NTILES * 4; ++i) {
      out[i / (NTILES * 4)][i / 4 % NTILES][i % 4] = 0;
    }
#pragma unroll
    for (int step = 0; step < kScanSteps; step += 16) {
      if constexpr (kTerms == 1) {
        uint32_t left[kTerms][2][4];
        load_chunks(left, chunks, step);
        multiply_fragments<Operand>(out, left, table, step, column);
      } else {  // one half of the rows at a time, because three terms take more registers
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          synchronize_warp();  // keeps the compiler from moving loads to before it
          uint32_t left[kTerms][1][4];
#pragma unroll
          for (int term = 0; term < kTerms; ++term) {
            load_left(left[term][0], chunks, term, 16 * m, step);
          }
          multiply_fragments<Operand>(half_of(out, m), left, table, step, column);
        }
      }
    }
  }

  // Calls call(m, n, half) for the pairs of columns that a lane has in a product: row 16 m + 8 half + lane / 4, columns
  // 8 n + 2 (lane % 4) and the next one.
  template <typename Call>
  LONGVQ_DEVICE static void for_each_pair(const Call& call) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          call(m, n, half);
        }
      }
    }
  }

  // The number in a product for mode 4 n + lane % 4 and chunk 4 (lane / 4) + i.
  template <int NTILES>
  LONGVQ_DEVICE static ComplexFloat complex_at(const float (&x)[2][NTILES][4], int n, int i) {
    return {x[i / 2][n][i % 2 * 2], x[i / 2][n][i % 2 * 2 + 1]};
  }
};

// Launches KERNEL over the segments of `p`. If sequences have several segments, two launches before it make the states
// that segments start from: KERNEL makes the states that they end with, and ENTER chains them.
template <auto KERNEL, auto ENTER, typename Block, typename Problem>
int run_segments(const Scan& p, const Problem& problem, const float* segment_states, size_t bytes, void* stream) {
  const dim3 grid(
      static_cast<unsigned>(divide_up(p.modes.channels, Block::kChannels)), static_cast<unsigned>(p.batch),
      static_cast<unsigned>(p.num_segments()));
  if (segment_states != nullptr) {
    if (const int error = launch<KERNEL>(grid, Block::kThreads, bytes, stream, problem, Pass::kStates)) {
      return error;
    }
    const dim3 all(static_cast<unsigned>(divide_up(p.num_sequences() * p.modes.channels * p.modes.modes, 128)));
    if (const int error = launch<ENTER>(all, 128, 0, stream, problem)) {
      return error;
    }
  }
  return launch<KERNEL>(grid, Block::kThreads, bytes, stream, problem, Pass::kResults);
}

LONGVQ_DEVICE ComplexFloat shuffle_complex_up(ComplexFloat x, int by) {
  return {shuffle_up(x.re, by), shuffle_up(x.im, by)};
}

}  // namespace
}  // namespace longvq::cuda
