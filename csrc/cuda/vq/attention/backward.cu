// The attention's backward: what comes before and after the kernels that are compiled for each type in files of their
// own.
#include "../../common/dispatch.h"
#include "../../common/pieces.h"

namespace longvq::cuda {

int attention_gradients_float(const AttentionGradients& problem, void* stream);
int attention_gradients_bfloat16(const AttentionGradients& problem, void* stream);
int attention_gradients_half(const AttentionGradients& problem, void* stream);

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

LONGVQ_DEVICE bool is_ignored(const uint8_t* ignored, int64_t place) {
  return ignored != nullptr && ignored[place] != 0;
}

// A warp for a row.
template <typename Element>
__global__ void __launch_bounds__(kThreads) make_deltas(Deltas p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t at = row % p.length, head = row / p.length % p.heads, batch = row / p.length / p.heads;
  if (batch >= p.batch) {
    return;  // the whole warp
  }
  const int64_t place = batch * p.grad_batch + head * p.grad_head + at * p.grad_length;
  const auto* grad = static_cast<const Element*>(p.grad) + place;
  const auto* out = static_cast<const Element*>(p.out) + row * p.values;
  float sum = 0;
  for (int64_t e = threadIdx.x % 32; e < p.values; e += 32) {
    sum += to_float(grad[e]) * to_float(out[e]);
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    sum += shuffle_xor(sum, mask);
  }
  if (threadIdx.x % 32 == 0) {
    p.deltas[row] = is_ignored(p.ignored, batch * p.ignored_batch + at * p.ignored_length) ? 0.0f : sum;
  }
}

// A thread for a column of a code.
__global__ void __launch_bounds__(kThreads) sum_code_segments(SumSegments p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, columns = max(p.far_depth, p.values);
  const int64_t column = i % columns, code = i / columns % p.codes, head = i / columns / p.codes % p.heads;
  const int64_t number = i / columns / p.codes / p.heads;
  if (number >= p.sequences()) {
    return;
  }
  const Sequence of = sequence_of(p, number);
  const int64_t count = max(divide_up(of.length, p.code_segment), int64_t{1});
  const int64_t first = (of.batch * p.heads + head) * p.segments() + of.first_piece(p, p.code_segment);
  if (column < p.far_depth) {
    float* dcodes = p.dcodes + (first * p.codes + code) * p.far_depth + column;
    float sum = 0;
    for (int64_t segment = 0; segment < count; ++segment) {
      sum += dcodes[segment * p.codes * p.far_depth];
    }
    *dcodes = sum;
  }
  if (column < p.values && p.later != nullptr) {
    const auto place = [&](int64_t segment) { return ((first + segment) * p.codes + code) * p.values + column; };
    float sum = 0;
    for (int64_t segment = 0; p.earlier != nullptr && segment < count; ++segment) {
      p.earlier[place(segment)] = sum;
      sum += p.later[place(segment)];
    }
    sum = 0;
    for (int64_t segment = count - 1; segment >= 0; --segment) {
      const float own = p.later[place(segment)];
      p.later[place(segment)] = p.all_far ? sum + own : sum;
      sum += own;
    }
  }
}

// What a key gets for its value from queries of other segments than those that gave to it themselves.
struct OtherSegments {
  const FinishKeys& p;
  const float *later, *earlier;  // rows of values, or null

  LONGVQ_DEVICE OtherSegments(const FinishKeys& problem, const Sequence& of, int64_t head, int64_t key, int64_t code)
      : p(problem), later(nullptr), earlier(nullptr) {
    if (p.later == nullptr) {
      return;
    }
    const int64_t row = (of.batch * p.heads + head) * p.pieces(p.code_segment) + of.first_piece(p, p.code_segment);
    const auto place = [&](int64_t segment) { return ((row + segment) * p.codes + code) * p.values; };
    const int64_t reach = max(p.window, int64_t{1});
    // The first far field that sees the key from behind it, and the last one from before it.
    const int64_t first = p.all_far ? 0 : (key + reach - 1) / kFarBlock + 1;
    const int64_t last = (key - reach + 1) / kFarBlock - 1;
    if (first * kFarBlock < of.length) {
      later = p.later + place(first * kFarBlock / p.code_segment);
    }
    if (p.earlier != nullptr && key - reach + 1 >= kFarBlock) {
      earlier = p.earlier + place(last * kFarBlock / p.code_segment);
    }
  }

  LONGVQ_DEVICE float at(int64_t column) const {
    return (later != nullptr ? later[column] : 0.0f) + (earlier != nullptr ? earlier[column] : 0.0f);
  }
};

template <typename Element>
__global__ void __launch_bounds__(kThreads) finish_keys(FinishKeys p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t at = row % p.length, of = row / p.length, batch = of / p.heads;
  if (batch >= p.batch) {
    return;
  }
  const bool ignored = is_ignored(p.ignored, batch * p.ignored_batch + at * p.ignored_length);
  const Sequence sequence = sequence_at(p, at, batch);
  // The places of the sequence in what its segments got, and in its means, of each head.
  const int64_t sums = of * p.pieces(p.code_segment) + sequence.first_piece(p, p.code_segment);
  const int64_t means = p.offsets == nullptr ? of : of * p.documents + sequence.number;
  const int64_t code = min(max(p.code_of_key[row], int64_t{0}), p.codes - 1), columns = p.far_first + p.far_depth;
  Element* dk = static_cast<Element*>(p.dk) + row * columns;
  for (int64_t c = threadIdx.x % 32; c < columns; c += 32) {
    float value = c < p.near_depth ? p.dk_inside[row * p.near_depth + c] : 0.0f;
    const int64_t far = c - p.far_first;
    if (far >= 0 && p.dcodes != nullptr && !ignored) {
      const int64_t place = means * padded_codes(p.codes) + code;
      value += p.means[place * value_pitch(p.far_depth) + far];
      value += p.dcodes[(sums * p.codes + code) * p.far_depth + far] / p.numbers[place];
    }
    store(dk + c, value);
  }
  const OtherSegments others(p, sequence, of % p.heads, at - sequence.start, code);
  Element* dv = static_cast<Element*>(p.dv) + row * p.values;
  for (int64_t e = threadIdx.x % 32; e < p.values; e += 32) {
    const int64_t place = row * p.values + e;
    const float ahead = p.dv_ahead != nullptr ? p.dv_ahead[place] : 0.0f;
    store(dv + e, p.dv_near[place] + p.dv_far[place] + ahead + (ignored ? 0.0f : others.at(e)));
  }
}

dim3 rows(int64_t count) {
  return dim3(static_cast<unsigned>(divide_up(count, kWarps)));
}

}  // namespace

int longvq_cuda_deltas(const Deltas* problem, void* stream) {
  const Deltas& p = *problem;
  return for_element(p.type, [&](auto element) {
    const dim3 grid = rows(p.batch * p.heads * p.length);
    return launch<make_deltas<decltype(element)>>(grid, kThreads, 0, stream, p);
  });
}

int longvq_cuda_sum_segments(const SumSegments* problem, void* stream) {
  const SumSegments& p = *problem;
  const int64_t threads = p.sequences() * p.heads * p.codes * (p.far_depth > p.values ? p.far_depth : p.values);
  const dim3 grid(static_cast<unsigned>(divide_up(threads, kThreads)));
  return launch<sum_code_segments>(grid, kThreads, 0, stream, p);
}

int longvq_cuda_finish_keys(const FinishKeys* problem, void* stream) {
  const FinishKeys& p = *problem;
  return for_element(p.type, [&](auto element) {
    const dim3 grid = rows(p.batch * p.heads * p.length);
    return launch<finish_keys<decltype(element)>>(grid, kThreads, 0, stream, p);
  });
}

int longvq_cuda_attention_gradients(const AttentionGradients* problem, void* stream) {
  const Attention& p = problem->forward;
  if (p.batch > kMaxGrid || p.batch * p.pieces(problem->code_segment) > kMaxGrid) {
    return kNotCovered;
  }
  switch (p.type) {
    case ElementType::kFloat:
      return attention_gradients_float(*problem, stream);
    case ElementType::kBFloat16:
      return attention_gradients_bfloat16(*problem, stream);
    case ElementType::kHalf:
      return attention_gradients_half(*problem, stream);
  }
  return kNotCovered;
}

}  // namespace longvq::cuda
