// Compiled once per instruction set, with LONGVQ_ISA set to its name; common/simd.h says what such a file may include.
//
// argmin_s ||k - C_s||^2 = argmax_s (k.C_s - ||C_s||^2 / 2). Lanes hold codes, and a few keys are broadcast. The kRows
// x kVectors registers of scores are only compared with the best scores so far, never stored. A score is one sequence
// of multiply-adds over d, the same at every index of key and code: equal codewords get equal scores, and results
// depend neither on threads nor on the block size.
#include "assign_kernel.h"

#include "../../common/numbers.h"
#include "../../common/simd.h"

namespace longvq {
namespace {

// kRows * kVectors accumulators, kVectors registers of codes and one broadcast key must fit into the registers.
#if defined(__AVX512F__)
constexpr int kRows = 6, kVectors = 4;  // 24 + 4 + 1 of 32
#elif defined(__AVX2__)
constexpr int kRows = 6, kVectors = 2;  // 12 + 2 + 1 of 16
#else
constexpr int kRows = 4, kVectors = 2;  // 8 + 2 + 1 and one product of 16: no fused multiply-add
#endif
constexpr int kPanel = kLanes * kVectors;

// ROWS keys with a panel of VECTORS * kLanes codes, the first of which is `first_code`.
template <int ROWS, int VECTORS>
inline void tile(const AssignBlock& block, int64_t row, int64_t first_code) {
  const float* keys = block.keys + row * block.head_dim;
  const float* panel = block.panels + first_code * block.head_dim;
  const Floats* bias = reinterpret_cast<const Floats*>(block.bias + first_code);

  Floats score[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) {
      score[r][v] = bias[v];
    }
  }
  for (int64_t d = 0; d < block.head_dim; ++d) {
    const Floats* codes = reinterpret_cast<const Floats*>(panel + d * VECTORS * kLanes);
    for (int r = 0; r < ROWS; ++r) {
      const float key = keys[r * block.head_dim + d];
      for (int v = 0; v < VECTORS; ++v) {
        score[r][v] += codes[v] * key;
      }
    }
  }

  SignedWords code;
  for (int lane = 0; lane < kLanes; ++lane) {
    code[lane] = static_cast<int32_t>(first_code) + lane;
  }
  Floats* best = reinterpret_cast<Floats*>(block.best + row * kLanes);
  SignedWords* best_code = reinterpret_cast<SignedWords*>(block.best_code + row * kLanes);
  // Unrolled: with an index that is known only at run time, the scores would go through memory.
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      // Strictly greater: of equal scores the lower code wins, and a NaN score never wins.
      const auto better = score[r][v] > best[r];
      best[r] = better ? score[r][v] : best[r];
      best_code[r] = better ? code + v * kLanes : best_code[r];
    }
  }
}

template <int VECTORS>
inline void panel_against_rows(const AssignBlock& block, int64_t first_code) {
  int64_t row = 0;
  // The keys of the block are padded to whole steps, so the last step may process padding. One or two keys are faster
  // row by row.
  for (; block.rows - row > 2; row += kRows) {
    tile<kRows, VECTORS>(block, row, first_code);
  }
  for (; row < block.rows; ++row) {
    tile<1, VECTORS>(block, row, first_code);
  }
}

// The best lane of each key; of equal scores the lowest code.
inline void reduce_lanes(const AssignBlock& block) {
  for (int64_t row = 0; row < block.rows; ++row) {
    const float* best = block.best + row * kLanes;
    const int32_t* best_code = block.best_code + row * kLanes;
    float score = best[0];
    int32_t code = best_code[0];
    for (int lane = 1; lane < kLanes; ++lane) {
      const bool better = best[lane] > score || (best[lane] == score && best_code[lane] < code);
      score = better ? best[lane] : score;
      code = better ? best_code[lane] : code;
    }
    block.out[row] = code;
  }
}

void assign(const AssignBlock& block) {
  const int64_t steps = (block.rows + kRows - 1) / kRows;
  for (int64_t i = 0; i < steps * kRows * kLanes; ++i) {
    block.best[i] = -kInfinity;
    block.best_code[i] = 0;
  }
  int64_t first_code = 0;
  for (; first_code + kPanel <= block.codes; first_code += kPanel) {
    panel_against_rows<kVectors>(block, first_code);
  }
  switch ((block.codes - first_code) / kLanes) {
#if defined(__AVX512F__)
    case 3:
      panel_against_rows<3>(block, first_code);
      break;
    case 2:
      panel_against_rows<2>(block, first_code);
      break;
#endif
    case 1:
      panel_against_rows<1>(block, first_code);
      break;
    default:
      break;
  }
  reduce_lanes(block);
}

}  // namespace

extern const AssignKernel LONGVQ_JOIN(assign_kernel_, LONGVQ_ISA) = {kLanes, kPanel, kRows, &assign};

}  // namespace longvq
