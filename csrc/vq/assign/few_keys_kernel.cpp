// Compiled once per instruction set, with LONGVQ_ISA set to its name; common/simd.h says what such a file may include.
//
// argmax_s (k.C_s - ||C_s||^2 / 2) as in assign_kernel.cpp. But the codebook is read once, without packing: lanes hold
// entries along D, and norms are computed from the same registers as products. Four codes are processed together, so
// that their sums over lanes are additions of whole registers. Every score is computed by the same operations, at every
// index and for every number of keys: equal codewords get equal scores.
#include "few_keys_kernel.h"

#include "../../common/numbers.h"
#include "../../common/simd.h"

namespace longvq {
namespace {

constexpr int kCodes = 4;  // scores in a register

typedef float Scores __attribute__((vector_size(kCodes * sizeof(float)), may_alias));
typedef int32_t Codes __attribute__((vector_size(kCodes * sizeof(int32_t)), may_alias));

struct Best {
  Scores score[kFewKeys];
  Codes code[kFewKeys];
};

inline Scores folded(Floats x) {
  Scores parts[kLanes / kCodes];
  std::memcpy(parts, &x, sizeof x);
  Scores sum = parts[0];
  for (int i = 1; i < kLanes / kCodes; ++i) {
    sum += parts[i];
  }
  return sum;
}

// The sums of the lanes of four registers.
inline Scores lane_sums(Scores a, Scores b, Scores c, Scores d) {
  const Scores ab = Scores{a[0], b[0], a[1], b[1]} + Scores{a[2], b[2], a[3], b[3]};
  const Scores cd = Scores{c[0], d[0], c[1], d[1]} + Scores{c[2], d[2], c[3], d[3]};
  return Scores{ab[0], ab[1], cd[0], cd[1]} + Scores{ab[2], ab[3], cd[2], cd[3]};
}

// Scores of codes FIRST .. FIRST + COUNT of four for ROWS keys, not yet summed over lanes.
template <int ROWS, int FIRST, int COUNT>
inline void products(const AssignFew& few, int64_t row, const float* const* codes, Scores (*out)[kCodes]) {
  const float* keys = few.keys + row * few.head_dim;
  Floats square[COUNT] = {}, product[ROWS][COUNT] = {};
  for (int64_t d = 0; d < few.head_dim; d += kLanes) {
    for (int c = 0; c < COUNT; ++c) {
      const Floats code = load<Floats>(codes[FIRST + c] + d);
      square[c] += code * code;
      for (int r = 0; r < ROWS; ++r) {
        product[r][c] += code * load<Floats>(keys + r * few.head_dim + d);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int c = 0; c < COUNT; ++c) {
      out[r][FIRST + c] = folded(product[r][c] - 0.5f * square[c]);
    }
  }
}

// Keys row .. row + ROWS against codes first_code .. first_code + 4.
template <int ROWS>
inline void tile(const AssignFew& few, int64_t row, int64_t first_code, Best& best) {
  // Past the end of the codebook the last code is used again. It then has the same score and a higher index, so it
  // never wins.
  const float* codes[kCodes];
  for (int c = 0; c < kCodes; ++c) {
    const int64_t code = first_code + c < few.codes ? first_code + c : few.codes - 1;
    codes[c] = few.codebook + code * few.code_stride;
  }
  Scores parts[ROWS][kCodes];
  if (ROWS <= 2) {  // the registers hold the sums of all four codes
    products<ROWS, 0, 4>(few, row, codes, parts);
  } else {
    products<ROWS, 0, 2>(few, row, codes, parts);
    products<ROWS, 2, 2>(few, row, codes, parts);
  }
  const int32_t code = static_cast<int32_t>(first_code);
  const Codes numbers = {code, code + 1, code + 2, code + 3};
  for (int r = 0; r < ROWS; ++r) {
    const Scores score = lane_sums(parts[r][0], parts[r][1], parts[r][2], parts[r][3]);
    // Strictly greater: of equal scores the lower code wins, and a NaN score never wins.
    const auto better = score > best.score[row + r];
    best.score[row + r] = better ? score : best.score[row + r];
    best.code[row + r] = better ? numbers : best.code[row + r];
  }
}

void assign(const AssignFew& few) {
  Best best;
  for (int64_t row = 0; row < few.rows; ++row) {
    best.score[row] = Scores{} - kInfinity;
    best.code[row] = Codes{};
  }
  for (int64_t code = 0; code < few.codes; code += kCodes) {
    int64_t row = 0;
    for (; row + 4 <= few.rows; row += 4) {
      tile<4>(few, row, code, best);
    }
    for (; row + 2 <= few.rows; row += 2) {
      tile<2>(few, row, code, best);
    }
    for (; row < few.rows; ++row) {
      tile<1>(few, row, code, best);
    }
  }
  for (int64_t row = 0; row < few.rows; ++row) {
    float score = best.score[row][0];
    int32_t code = best.code[row][0];
    for (int lane = 1; lane < kCodes; ++lane) {
      const float other = best.score[row][lane];
      const bool better = other > score || (other == score && best.code[row][lane] < code);
      score = better ? other : score;
      code = better ? best.code[row][lane] : code;
    }
    few.out[row] = code;
  }
}

}  // namespace

extern const AssignFewKernel LONGVQ_JOIN(assign_few_kernel_, LONGVQ_ISA) = {kLanes, &assign};

}  // namespace longvq
