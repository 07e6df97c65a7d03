// What the kernels of the scan share: a warp has a channel, of which it has kScanTile steps at a time in shared memory.
#pragma once

#include "../common/dispatch.h"
#include "../common/pieces.h"
#include "table_layout.h"

namespace longvq::cuda {
namespace {

using Number = Complex<float>;

// What a pass over the sequence is for: the states that segments leave, starting from zero, or results.
enum class Pass { kStates, kResults };
constexpr int kTiles = kScanSteps / 8;  // fragments (16, 8) side by side

// (batch, length, channels) with any strides.
struct Inputs {
  const void* data;
  int64_t batch, length, channel;  // strides
};

template <typename Element, int CHANNELS>
struct ScanBlock {
  using Operand = ScanOperand<Element>;
  using Layout = ScanLayout<Operand::kParts>;
  using Chunks = typename Layout::Chunks;
  static constexpr int kParts = Operand::kParts;
  static constexpr int kChannels = CHANNELS;  // a warp each
  static constexpr int kThreads = 32 * kChannels;

  const Scan& p;
  Sequence of;
  int64_t segment, first_channel, channel, begin, end, padded;  // steps begin .. end of the scan's own order
  int count;                                                    // of channels here
  int warp, lane;

  LONGVQ_DEVICE ScanBlock(const Scan& problem, const Piece& piece) : p(problem), of(piece.of), segment(piece.index) {
    first_channel = static_cast<int64_t>(blockIdx.x) * kChannels;
    count = static_cast<int>(min(p.modes.channels - first_channel, int64_t{kChannels}));
    begin = segment * p.segment_length;
    end = min(begin + p.segment_length, of.length);
    padded = padded_modes(p.modes.modes);
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    channel = first_channel + warp;
  }

  LONGVQ_DEVICE bool has_channel() const { return warp < count; }
  LONGVQ_DEVICE int64_t position(int64_t step) const { return of.start + (p.reverse ? of.length - 1 - step : step); }
  LONGVQ_DEVICE uint32_t mask_of(int64_t at) const {
    return p.ignored == nullptr ? 0 : p.ignored[of.batch * p.ignored_batch + at * p.ignored_length];
  }
  LONGVQ_DEVICE bool ignored(int64_t at) const { return mask_of(at) != 0; }
  // The segment's place among those of a row of the tensors.
  LONGVQ_DEVICE int64_t segment_of_row() const { return of.first_piece(p, p.segment_length) + segment; }
  // Of the last segment of a sequence the state enters no other.
  LONGVQ_DEVICE bool is_last() const { return end == of.length; }
  LONGVQ_DEVICE int64_t state_place(int64_t mode) const {
    return (of.number * p.modes.channels + channel) * p.modes.modes + mode;
  }

  // Copies the tables of these channels, `size` numbers each, and their powers of decays.
  LONGVQ_DEVICE void fill_tables(uint16_t* tables, const uint16_t* from, int64_t size, Number* decays) const {
    for (int64_t i = threadIdx.x * 8; i < count * size; i += kThreads * 8) {
      copy_later(tables + i, from + first_channel * size + i, 16);
    }
    commit_copies();
    const auto* numbers = reinterpret_cast<const Number*>(p.decays) + first_channel * padded * kScanPowers;
    for (int64_t i = threadIdx.x; i < count * padded * kScanPowers; i += kThreads) {
      decays[i] = numbers[i];
    }
    wait_for_copies<0>();
  }

  // Steps first .. first + kScanTile of all channels of the block, zero where there are none.
  LONGVQ_DEVICE void read(const Inputs& x, int64_t first, const Chunks& of_first_channel) const {
    const auto* from = static_cast<const Element*>(x.data) + of.batch * x.batch + first_channel * x.channel;
    if constexpr (kTogether) {
      if (are_together(from, x.length, x.channel)) {
        read_together(from, x.length, first, of_first_channel);
        return;
      }
    }
    for (int i = threadIdx.x; i < kScanTile; i += kThreads) {
      const int64_t at = position(first + i);
      const bool there = first + i < end && !ignored(at);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        uint16_t parts[kParts];
        Operand::split(there && c < count ? to_float(from[at * x.length + c * x.channel]) : 0.0f, parts);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          *next(of_first_channel, c).at(part, row_of(i / kScanSteps), i % kScanSteps) = parts[part];
        }
      }
    }
  }
  // Whether one access can take the channels of a step, which lie side by side.
  static constexpr bool kTogether = kParts == 1 && sizeof(Element) == sizeof(uint16_t);
  struct alignas(sizeof(uint16_t) * kChannels) Together {
    uint32_t pairs[kChannels / 2];
  };
  LONGVQ_DEVICE bool are_together(const Element* first, int64_t length_stride, int64_t channel_stride) const {
    return kTogether && count == kChannels && channel_stride == 1 && length_stride % kChannels == 0 &&
           reinterpret_cast<uintptr_t>(first) % sizeof(Together) == 0;
  }

  // Such channels of a tile: a lane has two steps of a chunk in each of so many rounds. The halves of a warp have
  // chunks whose rows lie in different banks.
  static constexpr int kRounds = kScanTile / kThreads / 2;
  LONGVQ_DEVICE int chunk_of_round(int round) const { return round * kChannels + warp + lane / 16 * 16; }
  LONGVQ_DEVICE int first_of_round() const { return lane % 16 * 2; }

  LONGVQ_DEVICE void read_together(
      const Element* from, int64_t stride, int64_t first, const Chunks& of_first_channel) const {
    Together held[kRounds][2];  // all are on their way before the first is needed
    uint32_t masks[kRounds][2];
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t step = first + chunk_of_round(round) * kScanSteps + first_of_round() + i, at = position(step);
        held[round][i] = {};
        masks[round][i] = 0;
        if (step < end) {
          held[round][i] = *reinterpret_cast<const Together*>(from + at * stride);
          masks[round][i] = mask_of(at);
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
        uint16_t* to = next(of_first_channel, c).at(0, row_of(chunk_of_round(round)), first_of_round());
        *reinterpret_cast<uint32_t*>(to) = same_halves(two[0], two[1], c % 2);
      }
    }
  }
  // Of two words the low halves, or the high ones, the first below.
  LONGVQ_DEVICE static uint32_t same_halves(uint32_t first, uint32_t second, int high) {
    return high == 0 ? (first & 0xffff) | second << 16 : first >> 16 | (second & 0xffff0000);
  }
  LONGVQ_DEVICE static Chunks next(const Chunks& chunks, int by) {
    return {chunks.data + by * (Chunks::kBytes / sizeof(uint16_t))};
  }

  // The number that is in parts in a tile.
  LONGVQ_DEVICE static float value_at(const Chunks& chunks, int chunk, int t) {
    float value = 0;
#pragma unroll
    for (int part = kParts - 1; part >= 0; --part) {
      value += from_bits(static_cast<uint32_t>(*chunks.at(part, row_of(chunk), t)) << 16);
    }
    return value;
  }

  // Chunk 4 g + 2 m + half is row 16 m + 8 half + g of the products: so the chunks of a lane follow each other. Rows of
  // tiles are the same, so that rows which are loaded together lie in different banks.
  LONGVQ_DEVICE static int row_of(int chunk) { return chunk % 4 * 8 + chunk / 4; }

  LONGVQ_DEVICE void load_chunks(uint32_t (&out)[kParts][2][4], const Chunks& chunks, int step) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_left(out[part][m], chunks, part, 16 * m, step);
      }
    }
  }

  // Half of the rows of a product.
  template <int NTILES>
  LONGVQ_DEVICE static float (&half_of(float (&x)[2][NTILES][4], int m))[1][NTILES][4] {
    return reinterpret_cast<float (&)[1][NTILES][4]>(x[m]);
  }

  // out = chunks · table, its columns from `column`: what each chunk gives to each.
  template <int NTILES>
  LONGVQ_DEVICE void multiply_chunks(
      float (&out)[2][NTILES][4], const Chunks& chunks, const typename Layout::Table& table, int column = 0) const {
#pragma unroll
    for (int i = 0; i < 2 * NTILES * 4; ++i) {
      out[i / (NTILES * 4)][i / 4 % NTILES][i % 4] = 0;
    }
#pragma unroll
    for (int step = 0; step < kScanSteps; step += 16) {
      if constexpr (kParts == 1) {
        uint32_t left[kParts][2][4];
        load_chunks(left, chunks, step);
        multiply_fragments<Operand>(out, left, table, step, column);
      } else {  // one half of the rows after the other, since the parts take registers
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          synchronize_warp();  // over which the compiler moves no loads
          uint32_t left[kParts][1][4];
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            load_left(left[part][0], chunks, part, 16 * m, step);
          }
          multiply_fragments<Operand>(half_of(out, m), left, table, step, column);
        }
      }
    }
  }

  // The number of mode n · 4 + lane % 4 that chunk 4 (lane / 4) + i gave, and where it is.
  template <int NTILES>
  LONGVQ_DEVICE static Number number_at(const float (&x)[2][NTILES][4], int n, int i) {
    return {x[i / 2][n][i % 2 * 2], x[i / 2][n][i % 2 * 2 + 1]};
  }
};

// Launches a kernel over the segments of `p`; if they have states, which are in `problem`, those are made before, by
// the kernel itself and ENTER.
template <auto KERNEL, auto ENTER, typename Block, typename Problem>
int run_segments(const Scan& p, const Problem& problem, const float* segment_states, size_t bytes, void* stream) {
  const dim3 grid(
      static_cast<unsigned>(divide_up(p.modes.channels, Block::kChannels)), static_cast<unsigned>(p.batch),
      static_cast<unsigned>(p.segments()));
  if (segment_states != nullptr) {
    if (const int error = launch<KERNEL>(grid, Block::kThreads, bytes, stream, problem, Pass::kStates)) {
      return error;
    }
    const dim3 all(static_cast<unsigned>(divide_up(p.sequences() * p.modes.channels * p.modes.modes, 128)));
    if (const int error = launch<ENTER>(all, 128, 0, stream, problem)) {
      return error;
    }
  }
  return launch<KERNEL>(grid, Block::kThreads, bytes, stream, problem, Pass::kResults);
}

LONGVQ_DEVICE Number number_from_below(Number x, int by) {
  return {shuffle_up(x.re, by), shuffle_up(x.im, by)};
}

}  // namespace
}  // namespace longvq::cuda
