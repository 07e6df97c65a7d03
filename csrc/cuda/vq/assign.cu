// Nearest codewords: argmin_s ‖k − C_s‖² = argmax_s (k·C_s − ½‖C_s‖²), with products on tensor cores in float32
// precision.
//
// A block of four warps takes 64 or 128 keys, 16 or 32 for each warp, and visits all codes in tiles of 32.
#include "../common/dispatch.h"
#include "../common/tile.h"
#include "params.h"

namespace longvq::cuda {
namespace {

constexpr int kThreads = 128, kTile = 32;

// One warp for each code.
template <typename Operand>
__global__ void __launch_bounds__(kThreads) pack_codebook(PackCodebook p) {
  const int64_t codes = padded_codes(p.to.num_codes), columns = p.to.columns, head = blockIdx.y;
  const int64_t code = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const bool valid = code < p.to.num_codes;
  const float* from = p.from + head * p.head_stride + code * p.code_stride;
  float sum = 0;
  for (int64_t d = threadIdx.x % 32; d < columns; d += 32) {
    const float x = valid && d < p.to.head_dim ? from[d * p.column_stride] : 0.0f;
    uint16_t terms[Operand::kTerms];
    Operand::split(x, terms);
    for (int i = 0; i < Operand::kTerms; ++i) {
      p.to.terms[((head * Operand::kTerms + i) * codes + code) * columns + d] = terms[i];
    }
    sum += x * x;
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    sum += shuffle_xor(sum, mask);
  }
  if (threadIdx.x % 32 == 0) {
    p.to.half_norms[head * codes + code] = valid ? 0.5f * sum : INFINITY;
  }
}

// Keeps the code with the higher score; of equal scores the lower code.
LONGVQ_DEVICE void keep_better(float& score, int& code, float other, int other_code) {
  if (other > score || (other == score && other_code < code)) {
    score = other;
    code = other_code;
  }
}

// bfloat16 keys have one bfloat16 term, other keys have three.
template <typename Element>
using KeyOperand = std::conditional_t<std::is_same_v<Element, BFloat16>, OneBFloat16, ThreeBFloat16>;

template <typename Element, int HEAD_DIM>
struct AssignTiles {
  static constexpr int kBuffers = HEAD_DIM == 256 ? 1 : 2;
  // Each warp has kMTiles times 16 keys. Two halve the reads of codewords for each key, if shared memory has room.
  static constexpr int kMTiles = KeyOperand<Element>::kTerms == 1 && HEAD_DIM <= 128 ? 2 : 1;
  static constexpr int kKeys = 16 * kMTiles * (kThreads / 32);
  using Keys = Tile<kKeys, HEAD_DIM, KeyOperand<Element>::kTerms>;
  using Codes = Tile<kTile, HEAD_DIM, ThreeBFloat16::kTerms>;
  static constexpr size_t kBytes = Keys::kBytes + kBuffers * Codes::kBytes;
};

template <typename Element, int HEAD_DIM>
__global__ void __launch_bounds__(kThreads) assign(Assign p, bool aligned) {
  using Tiles = AssignTiles<Element, HEAD_DIM>;
  using Operand = KeyOperand<Element>;
  char* memory = shared_memory();
  const typename Tiles::Keys keys{reinterpret_cast<uint16_t*>(memory)};
  const auto codes = [&](int tile) {
    const size_t before = Tiles::Keys::kBytes + tile % Tiles::kBuffers * Tiles::Codes::kBytes;
    return typename Tiles::Codes{reinterpret_cast<uint16_t*>(memory + before)};
  };
  constexpr int kMTiles = Tiles::kMTiles;
  const int64_t head = blockIdx.y, batch = blockIdx.z, first = static_cast<int64_t>(blockIdx.x) * Tiles::kKeys;
  const int64_t padded = padded_codes(p.codebook.num_codes);
  const auto fill_codes = [&](int tile) {
    const uint16_t* terms = p.codebook.terms + head * ThreeBFloat16::kTerms * padded * HEAD_DIM;
    fill_packed<kThreads>(codes(tile), terms, padded, [&](int row) { return tile * kTile + row; });
    commit_copies();
  };
  const float* half_norms = p.codebook.half_norms + head * padded;
  const Element* from = static_cast<const Element*>(p.k) + batch * p.k_strides.batch + head * p.k_strides.head;
  const Rows<Element> rows{from, p.k_strides.length, static_cast<int>(p.codebook.head_dim), aligned};
  fill<Operand, kThreads>(keys, rows, [&](int row) { return first + row < p.length ? first + row : -1; });
  fill_codes(0);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float best[kMTiles][2];  // for rows lane / 4 and lane / 4 + 8
  int code[kMTiles][2] = {};
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
    best[m][0] = best[m][1] = -INFINITY;
  }
  const int tiles = static_cast<int>(divide_up(p.codebook.num_codes, kTile));
  for (int tile = 0; tile < tiles; ++tile) {
    if (Tiles::kBuffers == 2 && tile + 1 < tiles) {
      fill_codes(tile + 1);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();
    TwoFloats norms[kTile / 8];  // loaded before the products, which don't wait for them
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
      norms[n] = *reinterpret_cast<const TwoFloats*>(half_norms + tile * kTile + n * 8 + lane % 4 * 2);
    }
    float scores[kMTiles][kTile / 8][4] = {};
    multiply_rows<ThreeBFloat16>(scores, keys, warp * kMTiles * 16, codes(tile));
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
            // A key that isn't finite has no finite score, and keeps code 0.
            if (score > best[m][half] && score < INFINITY) {
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
  if (to.columns > kMaxHeadDim || to.head_dim > to.columns) {
    return kUnsupported;
  }
  const dim3 grid(static_cast<unsigned>(padded_codes(to.num_codes) / (kThreads / 32)), static_cast<unsigned>(to.heads));
  return for_dtype(problem->type, [&](auto element) {
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
    return kUnsupported;
  }
  const bool aligned = rows_aligned(p.k, p.type, p.k_strides);
  return for_dtype(p.type, [&](auto element) {
    return for_padded_columns<256>(p.codebook.columns, [&](auto columns) {
      using Tiles = AssignTiles<decltype(element), columns.value>;
      const dim3 grid(
          static_cast<unsigned>(divide_up(p.length, Tiles::kKeys)), static_cast<unsigned>(p.codebook.heads),
          static_cast<unsigned>(p.batch));
      return launch<assign<decltype(element), columns.value>>(grid, kThreads, Tiles::kBytes, stream, p, aligned);
    });
  });
}

}  // namespace longvq::cuda
