// Compiled once per instruction set, with LONGVQ_ISA set to its name; common/simd.h says what such a file may include.
#include "step_kernel.h"

#include "../../common/numbers.h"
#include "../../common/simd.h"
#include "../exp_negative.h"

namespace longvq {
namespace {

// Sums of pairs of neighbouring lanes. Each group of four lanes has two sums of `a`, then two sums of `b`. No lane
// crosses a 128-bit border, because that would be slow.
template <std::size_t... I>
inline Floats sums_of_pairs(Floats a, Floats b, std::index_sequence<I...>) {
  return lanes_of(a, b, std::index_sequence<(I / 4 * 4 + I % 2 * 2 + (I % 4 < 2 ? 0 : kLanes))...>{}) +
         lanes_of(a, b, std::index_sequence<(I / 4 * 4 + I % 2 * 2 + 1 + (I % 4 < 2 ? 0 : kLanes))...>{});
}

// Sums of neighbouring groups of four lanes: first the sums of `a`, then the sums of `b`.
template <std::size_t... I>
inline Floats sums_of_fours(Floats a, Floats b, std::index_sequence<I...>) {
  return lanes_of(a, b, std::index_sequence<(I / 4 * 8 + I % 4)...>{}) +
         lanes_of(a, b, std::index_sequence<(I / 4 * 8 + 4 + I % 4)...>{});
}

// Lane i of the result is the sum of all lanes of x[i]. Overwrites x.
inline Floats sums_of_lanes(Floats* x) {
  constexpr std::make_index_sequence<kLanes> kAll{};
  for (int left = kLanes / 2; left >= kLanes / 4; left /= 2) {
    for (int i = 0; i < left; ++i) {
      x[i] = sums_of_pairs(x[2 * i], x[2 * i + 1], kAll);
    }
  }
  for (int left = kLanes / 8; left > 0; left /= 2) {
    for (int i = 0; i < left; ++i) {
      x[i] = sums_of_fours(x[2 * i], x[2 * i + 1], kAll);
    }
  }
  return x[0];
}

// A register with the first `count` numbers, then zeros.
inline Floats load_part(const float* memory, int64_t count) {
  float part[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    part[i] = memory[i];
  }
  return load<Floats>(part);
}

constexpr int kTogether = 2;  // rows that share each load of the vectors

// Products of at most one register of rows with VECTORS vectors. Every row takes the same operations at every index.
template <int VECTORS, bool SQUARES>
inline void products_of_rows(
    const float* rows, int64_t row_stride, int64_t count, int64_t dim, const float* vectors, float* out,
    int64_t out_stride, float* squares) {
  const int64_t padded = round_up(dim, kLanes), whole = dim / kLanes * kLanes;
  Floats partial[VECTORS + 1][kLanes];
  for (int64_t first = 0; first < kLanes; first += kTogether) {
    Floats sums[kTogether][VECTORS] = {}, square[kTogether] = {};
    const float* row[kTogether];
    for (int i = 0; i < kTogether; ++i) {
      row[i] = rows + (first + i < count ? first + i : count - 1) * row_stride;
    }
    const auto add = [&](int i, int64_t d, Floats x) {
      for (int v = 0; v < VECTORS; ++v) {
        sums[i][v] += x * load<Floats>(vectors + v * padded + d);
      }
      if (SQUARES) {
        square[i] += x * x;
      }
    };
    for (int64_t d = 0; d < whole; d += kLanes) {
      for (int i = 0; i < kTogether; ++i) {
        add(i, d, load<Floats>(row[i] + d));
      }
    }
    for (int i = 0; whole < dim && i < kTogether; ++i) {
      add(i, whole, load_part(row[i] + whole, dim - whole));
    }
    for (int i = 0; i < kTogether; ++i) {
      const bool present = first + i < count;
      for (int v = 0; v < VECTORS; ++v) {
        partial[v][first + i] = present ? sums[i][v] : Floats{};
      }
      partial[VECTORS][first + i] = present ? square[i] : Floats{};
    }
  }
  for (int v = 0; v < VECTORS; ++v) {
    store(out + v * out_stride, sums_of_lanes(partial[v]));
  }
  if (SQUARES) {
    store(squares, sums_of_lanes(partial[VECTORS]));
  }
}

template <int VECTORS>
inline void products_and_squares(
    const float* rows, int64_t row_stride, int64_t count, int64_t dim, const float* vectors, float* out,
    int64_t out_stride, float* squares) {
  if (squares != nullptr) {
    products_of_rows<VECTORS, true>(rows, row_stride, count, dim, vectors, out, out_stride, squares);
  } else {
    products_of_rows<VECTORS, false>(rows, row_stride, count, dim, vectors, out, out_stride, nullptr);
  }
}

void products(
    const float* rows, int64_t row_stride, int64_t count, int64_t dim, const float* vectors, int64_t vector_count,
    float* out, int64_t out_stride, float* squares) {
  const int64_t padded = round_up(dim, kLanes);
  for (int64_t first = 0; first < count; first += kLanes) {
    const float* some = rows + first * row_stride;
    const int64_t n = count - first < kLanes ? count - first : kLanes;
    float* square = squares == nullptr ? nullptr : squares + first;
    int64_t v = 0;
    for (; v + 2 <= vector_count; v += 2, square = nullptr) {
      products_and_squares<2>(
          some, row_stride, n, dim, vectors + v * padded, out + v * out_stride + first, out_stride, square);
    }
    if (v < vector_count) {
      products_and_squares<1>(
          some, row_stride, n, dim, vectors + v * padded, out + v * out_stride + first, out_stride, square);
    }
  }
}

float softmax(float* scores, const float* counts, int64_t far, int64_t near) {
  Floats best = Floats{} - kInfinity;
  for (int64_t c = 0; c < far + near; c += kLanes) {
    Floats x = load<Floats>(scores + c);
    if (c < far) {  // a code without far keys must not become the largest score
      x = load<Floats>(counts + c) > 0.0f ? x : Floats{} - kInfinity;
      store(scores + c, x);
    }
    best = x > best ? x : best;
  }
  const float found = largest(best),
              max_score = found == -kInfinity ? 0.0f : found;  // no key is allowed: every weight is 0
  Floats weight_sum{};
  for (int64_t c = 0; c < far + near; c += kLanes) {
    const Floats weight = exp_negative(load<Floats>(scores + c) - max_score);
    store(scores + c, weight);
    weight_sum += c < far ? weight * load<Floats>(counts + c) : weight;
  }
  return sum_of(weight_sum);
}

template <int VECTORS>
inline void weighted_columns(const float* const* rows, const float* weights, int64_t count, int64_t first, float* out) {
  Floats sums[VECTORS] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int v = 0; v < VECTORS; ++v) {
      sums[v] += weights[i] * load<Floats>(rows[i] + first + v * kLanes);
    }
  }
  for (int v = 0; v < VECTORS; ++v) {
    store(out + first + v * kLanes, sums[v]);
  }
}

void weighted_sum(const float* const* rows, const float* weights, int64_t count, int64_t columns, float* out) {
  int64_t e = 0;
  for (; e + 8 * kLanes <= columns; e += 8 * kLanes) {
    weighted_columns<8>(rows, weights, count, e, out);
  }
  for (; e + 4 * kLanes <= columns; e += 4 * kLanes) {
    weighted_columns<4>(rows, weights, count, e, out);
  }
  for (; e + kLanes <= columns; e += kLanes) {
    weighted_columns<1>(rows, weights, count, e, out);
  }
  for (; e < columns; ++e) {
    float sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      sum += weights[i] * rows[i][e];
    }
    out[e] = sum;
  }
}

}  // namespace

extern const AttentionStepKernel LONGVQ_JOIN(attention_step_kernel_, LONGVQ_ISA) = {
    kLanes, &products, &softmax, &weighted_sum};

}  // namespace longvq
