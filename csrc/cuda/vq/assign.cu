// Nearest codewords: argmin_s ‖k − C_s‖² = argmax_s (k·C_s − ½‖C_s‖²), products on tensor cores in float32 precision.
//
// A block takes 64 or 128 keys, four warps with 16 rows once or twice, past all codes in tiles of 32. Nothing but the
// codes is written.
#include <initializer_list>

#include "../common/dispatch.h"
#include "../common/tile.h"

namespace longvq::cuda {
namespace {

constexpr int kThreads = 128, kTile = 32;

template <typename Operand>
__global__ void __launch_bounds__(kThreads) pack_codebook(PackCodebook p) {
  const int64_t codes = padded_codes(p.to.codes), depth = p.to.columns, head = blockIdx.y;
  const int64_t code = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const bool there = code < p.to.codes;
  const float* from = p.from + head * p.head_stride + code * p.code_stride;
  float sum = 0;
  for (int64_t d = threadIdx.x % 32; d < depth; d += 32) {
    const float x = there && d < p.to.depth ? from[d * p.depth_stride] : 0.0f;
    uint16_t parts[Operand::kParts];
    Operand::split(x, parts);
    for (int i = 0; i < Operand::kParts; ++i) {
      p.to.parts[((head * Operand::kParts + i) * codes + code) * depth + d] = parts[i];
    }
    sum += x * x;
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    sum += shuffle_xor(sum, mask);
  }
  if (threadIdx.x % 32 == 0) {
    p.to.half_norms[head * codes + code] = there ? 0.5f * sum : INFINITY;
  }
}

// The better of two codes by their scores; of equal ones the lower.
LONGVQ_DEVICE void keep_better(float& score, int& code, float other, int other_code) {
  if (other > score || (other == score && other_code < code)) {
    score = other;
    code = other_code;
  }
}

// bfloat16 keys are one bfloat16, the others three.
template <typename Element>
using KeyOperand = std::conditional_t<std::is_same_v<Element, BFloat16>, OneBFloat16, ThreeParts>;

template <typename Element, int DEPTH>
struct AssignTiles {
  static constexpr int kBuffers = DEPTH == 256 ? 1 : 2;
  // Rows of 16 keys for each warp: two halve what is read of the codes for each key, where memory has room for both.
  static constexpr int kMTiles = KeyOperand<Element>::kParts == 1 && DEPTH <= 128 ? 2 : 1;
  static constexpr int kKeys = 16 * kMTiles * (kThreads / 32);
  using Keys = Tile<kKeys, DEPTH, KeyOperand<Element>::kParts>;
  using Codes = Tile<kTile, DEPTH, ThreeParts::kParts>;
  static constexpr size_t kBytes = Keys::kBytes + kBuffers * Codes::kBytes;
};

template <typename Element, int DEPTH>
__global__ void __launch_bounds__(kThreads) assign(Assign p, bool rows_aligned) {
  using Tiles = AssignTiles<Element, DEPTH>;
  using Operand = KeyOperand<Element>;
  char* memory = shared_memory();
  const typename Tiles::Keys keys{reinterpret_cast<uint16_t*>(memory)};
  const auto codes = [&](int tile) {
    const size_t before = Tiles::Keys::kBytes + tile % Tiles::kBuffers * Tiles::Codes::kBytes;
    return typename Tiles::Codes{reinterpret_cast<uint16_t*>(memory + before)};
  };
  constexpr int kMTiles = Tiles::kMTiles;
  const int64_t head = blockIdx.y, batch = blockIdx.z, first = static_cast<int64_t>(blockIdx.x) * Tiles::kKeys;
  const int64_t padded = padded_codes(p.codebook.codes);
  const auto fill_codes = [&](int tile) {
    const uint16_t* parts = p.codebook.parts + head * ThreeParts::kParts * padded * DEPTH;
    fill_packed<kThreads>(codes(tile), parts, padded, [&](int row) { return tile * kTile + row; });
    commit_copies();
  };
  const float* half_norms = p.codebook.half_norms + head * padded;
  const Element* from = static_cast<const Element*>(p.keys) + batch * p.batch_stride + head * p.head_stride;
  const Rows<Element> rows{from, p.length_stride, static_cast<int>(p.codebook.depth), rows_aligned};
  fill<Operand, kThreads>(keys, rows, [&](int row) { return first + row < p.length ? first + row : -1; });
  fill_codes(0);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float best[kMTiles][2];  // of rows lane / 4 and these + 8
  int code[kMTiles][2] = {};
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
    best[m][0] = best[m][1] = -INFINITY;
  }
  const int tiles = static_cast<int>(divide_up(p.codebook.codes, kTile));
  for (int tile = 0; tile < tiles; ++tile) {
    if (Tiles::kBuffers == 2 && tile + 1 < tiles) {
      fill_codes(tile + 1);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();
    TwoFloats norms[kTile / 8];  // asked for before the products, which don't wait for them
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
      norms[n] = *reinterpret_cast<const TwoFloats*>(half_norms + tile * kTile + n * 8 + lane % 4 * 2);
    }
    float scores[kMTiles][kTile / 8][4] = {};
    multiply_rows<ThreeParts>(scores, keys, warp * kMTiles * 16, codes(tile));
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int s = tile * kTile + n * 8 + lane % 4 * 2 + c;
        const float half_norm = c == 0 ? norms[n].first : norms[n].second;
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float score = scores[m][n][half * 2 + c] - half_norm;
            if (score > best[m][half] && score < INFINITY) {  // of a key that is not finite no score is: code 0
              best[m][half] = score;
              code[m][half] = s;
            }
          }
        }
      }
    }
    __syncthreads();
    if (Tiles::kBuffers == 1 && tile + 1 < tiles) {
      fill_codes(tile + 1);
    }
  }
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      for (int mask = 1; mask < 4; mask *= 2) {
        const float other = shuffle_xor(best[m][half], mask);
        keep_better(best[m][half], code[m][half], other, shuffle_xor(code[m][half], mask));
      }
      const int64_t row = first + (warp * kMTiles + m) * 16 + lane / 4 + half * 8;
      if (lane % 4 == 0 && row < p.length) {
        p.codes[(batch * p.codebook.heads + head) * p.length + row] = code[m][half];
      }
    }
  }
}

}  // namespace

int longvq_cuda_pack_codebook(const PackCodebook* problem, void* stream) {
  const Codebook& to = problem->to;
  if (to.columns > kMaxDepth || to.depth > to.columns) {
    return kNotCovered;
  }
  const dim3 grid(static_cast<unsigned>(padded_codes(to.codes) / (kThreads / 32)), static_cast<unsigned>(to.heads));
  return for_element(problem->type, [&](auto element) {
    using Operand = typename OperandOf<decltype(element)>::type;
    return launch<pack_codebook<Operand>>(grid, kThreads, 0, stream, *problem);
  });
}

int longvq_cuda_assign(const Assign* problem, void* stream) {
  const Assign& p = *problem;
  if (p.batch == 0 || p.length == 0 || p.codebook.heads == 0) {
    return 0;
  }
  if (p.batch > kMaxGrid || p.codebook.heads > kMaxGrid) {
    return kNotCovered;
  }
  const bool rows_aligned = aligned(p.keys, p.type, {p.batch_stride, p.head_stride, p.length_stride});
  return for_element(p.type, [&](auto element) {
    return for_depth(p.codebook.columns, [&](auto depth) {
      using Tiles = AssignTiles<decltype(element), depth.value>;
      const dim3 grid(
          static_cast<unsigned>(divide_up(p.length, Tiles::kKeys)), static_cast<unsigned>(p.codebook.heads),
          static_cast<unsigned>(p.batch));
      return launch<assign<decltype(element), depth.value>>(grid, kThreads, Tiles::kBytes, stream, p, rows_aligned);
    });
  });
}

}  // namespace longvq::cuda
