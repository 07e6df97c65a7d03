// Compiled once per instruction set, with LONGVQ_ISA set to its name; see simd.h for what it may include.
//
// One block of queries: scores against codes and near keys, weights, and the weighted sum of values, all in a scratch
// that stays in the cache. The two products broadcast one number of the left matrix against a panel of the right one.
#include "attention_kernel.h"

#include "../simd.h"

namespace longvq {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 6, kVectors = 4;  // 24 accumulators + 4 + 1 of 32 registers
#elif defined(__AVX2__)
constexpr int kRows = 6, kVectors = 2;  // 12 + 2 + 1 of 16
#else
constexpr int kRows = 4, kVectors = 2;  // 8 + 2 + 1 and a product of 16
#endif
constexpr int kPanel = kVectors * kLanes;
constexpr float kInfinity = __builtin_inff();

template <int ROWS, int VECTORS>
inline void tile(
    const float* a, int64_t a_stride, const float* panel, int64_t depth, bool add, float* out, int64_t out_stride) {
  Floats acc[ROWS][VECTORS] = {};
  for (int r = 0; add && r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) {
      acc[r][v] = load<Floats>(out + r * out_stride + v * kLanes);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Floats b[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      b[v] = load<Floats>(panel + (k * VECTORS + v) * kLanes);
    }
    for (int r = 0; r < ROWS; ++r) {
      const float value = a[r * a_stride + k];
      for (int v = 0; v < VECTORS; ++v) {
        acc[r][v] += b[v] * value;
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) {
      store(out + r * out_stride + v * kLanes, acc[r][v]);
    }
  }
}

template <int VECTORS>
inline void panel_product(
    int64_t rows, const float* a, int64_t a_stride, const float* panel, int64_t depth, bool add, float* out,
    int64_t out_stride) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    tile<kRows, VECTORS>(a + r * a_stride, a_stride, panel, depth, add, out + r * out_stride, out_stride);
  }
  for (; r < rows; ++r) {
    tile<1, VECTORS>(a + r * a_stride, a_stride, panel, depth, add, out + r * out_stride, out_stride);
  }
}

// out (rows, columns) = a (rows, depth) times the matrix in panels (depth, columns), or that added to it
void product(
    int64_t rows, const float* a, int64_t a_stride, const float* panels, int64_t depth, int64_t columns, bool add,
    float* out, int64_t out_stride) {
  int64_t c = 0;
  for (; c + kPanel <= columns; c += kPanel) {
    panel_product<kVectors>(rows, a, a_stride, panels + c * depth, depth, add, out + c, out_stride);
  }
  switch ((columns - c) / kLanes) {
#if defined(__AVX512F__)
    case 3:
      return panel_product<3>(rows, a, a_stride, panels + c * depth, depth, add, out + c, out_stride);
    case 2:
      return panel_product<2>(rows, a, a_stride, panels + c * depth, depth, add, out + c, out_stride);
#endif
    case 1:
      return panel_product<1>(rows, a, a_stride, panels + c * depth, depth, add, out + c, out_stride);
    default:
      return;
  }
}

// exp(x) for x <= 0, to two units in the last place; 0 below -87, where normal floats end.
inline Floats exp_negative(Floats x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
  const auto gone = x < -87.0f;
  x = gone ? Floats{} - 87.0f : x;
  const Floats shifted = x * kLog2e + kRound;
  const Floats k = shifted - kRound;
  const Floats r = (x - k * kLn2High) - k * kLn2Low;  // |r| <= ln 2 / 2
  Floats p = Floats{} + 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Words bits = reinterpret_cast<Words>(p) + (reinterpret_cast<Words>(shifted) << 23);  // p * 2^k
  return gone ? Floats{} : reinterpret_cast<Floats>(bits);
}

inline float largest(Floats x) {
  float value = x[0];
  for (int i = 1; i < kLanes; ++i) {
    value = x[i] > value ? x[i] : value;
  }
  return value;
}

// Near scores of one query: exact ones inside the window, the bias there, -infinity where a key is not allowed.
void mask_near(const AttentionBlock& block, int64_t row, float* scores) {
  for (int64_t c = 0; c < block.near_columns; c += kLanes) {
    store(scores + c, load<Floats>(scores + c) + load<Floats>(block.near_offsets + c));
  }
  // Columns of the window: offset = key - query with |offset| < W, causal only up to 0.
  const int64_t at_query = row - block.first_key;  // the column of offset 0
  int64_t first = at_query - block.window + 1, last = block.causal ? at_query + 1 : at_query + block.window;
  first = first < 0 ? 0 : first;
  last = last > block.near_columns ? block.near_columns : last;
  if (block.exact_keys != nullptr) {
    const float* exact = block.exact + row * block.near_columns;
    for (int64_t c = first; c < last; ++c) {
      scores[c] = exact[c] + block.near_offsets[c];
    }
  }
  if (block.bias != nullptr) {
    const float* bias = block.bias + block.window - 1 - at_query;
    for (int64_t c = first; c < last; ++c) {
      scores[c] += bias[c];
    }
  }
  if (block.causal) {
    for (int64_t c = at_query + 1 < 0 ? 0 : at_query + 1; c < block.near_columns; ++c) {
      scores[c] = -kInfinity;
    }
  }
}

inline float sum_of(Floats x) {
  float value = x[0];
  for (int i = 1; i < kLanes; ++i) {
    value += x[i];
  }
  return value;
}

void softmax_weights(const AttentionBlock& block, int64_t row, float* scores) {
  const int64_t columns = block.far_columns + block.near_columns;
  Floats best = Floats{} - kInfinity;
  for (int64_t c = 0; c < columns; c += kLanes) {
    const Floats x = load<Floats>(scores + c);
    best = x > best ? x : best;
  }
  const float found = largest(best), top = found == -kInfinity ? 0.0f : found;  // none allowed: every weight is 0
  Floats total{};
  for (int64_t c = 0; c < columns; c += kLanes) {
    const Floats weight = exp_negative(load<Floats>(scores + c) - top);
    store(scores + c, weight);
    total += c < block.far_columns ? weight * load<Floats>(block.far_counts + c) : weight;
  }
  block.top[row] = top;
  block.total[row] = sum_of(total);
}

// Mega's attention function, (1 + erf((x - mu) / (sigma sqrt 2))) / 2 with mu = sqrt(1/2), sigma = sqrt(1 / (4 pi)).
void laplace_weights(float* scores, int64_t columns) {
  constexpr float kMu = 0.70710678f, kInverse = 2.50662827f;  // 1 / (sigma sqrt 2) = sqrt(2 pi)
  for (int64_t c = 0; c < columns; ++c) {
    scores[c] = 0.5f * __builtin_erfcf((kMu - scores[c]) * kInverse);
  }
}

void forward(const AttentionBlock& block) {
  const int64_t far = block.far_columns, near = block.near_columns, columns = far + near;
  product(block.rows, block.queries, block.depth, block.codebook, block.depth, far, false, block.scores, columns);
  product(block.rows, block.queries, block.depth, block.codewords, block.depth, near, false, block.scores + far, columns);
  if (block.exact_keys != nullptr) {
    product(block.rows, block.queries, block.depth, block.exact_keys, block.depth, near, false, block.exact, near);
  }
  for (int64_t row = 0; row < block.rows; ++row) {
    float* scores = block.scores + row * columns;
    for (int64_t c = 0; c < far; c += kLanes) {
      store(scores + c, load<Floats>(scores + c) + load<Floats>(block.far_offsets + c));
    }
    if (near > 0) {
      mask_near(block, row, scores + far);
    }
    if (block.weight == AttentionWeight::kSoftmax) {
      softmax_weights(block, row, scores);
    } else {
      laplace_weights(scores, columns);
      block.top[row] = block.total[row] = 0.0f;
    }
  }
  product(block.rows, block.scores, columns, block.far_values, far, block.values, false, block.out, block.values);
  product(block.rows, block.scores + far, columns, block.near_values, near, block.values, true, block.out, block.values);
}

}  // namespace

extern const AttentionKernel LONGVQ_JOIN(attention_kernel_, LONGVQ_ISA) = {kLanes, kPanel, &forward};

}  // namespace longvq
