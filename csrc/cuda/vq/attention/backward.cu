// The launchers of attention's backward, and its small kernels: the deltas before the gradient kernels of backward.h,
// and the sums after them.
#include "../../common/dispatch.h"
#include "../../common/pieces.h"
#include "../params.h"

namespace longvq::cuda {

// In instances/.
int attention_gradients_float(const AttentionGradients& problem, void* stream);
int attention_gradients_bfloat16(const AttentionGradients& problem, void* stream);
int attention_gradients_half(const AttentionGradients& problem, void* stream);

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

// One warp for each query.
template <typename Element>
__global__ void __launch_bounds__(kThreads) make_deltas(Deltas p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t query = row % p.length, head = row / p.length % p.heads, batch = row / p.length / p.heads;
  if (batch >= p.batch) {
    return;  // the whole warp
  }
  const int64_t offset = batch * p.grad_strides.batch + head * p.grad_strides.head + query * p.grad_strides.length;
  const auto* grad = static_cast<const Element*>(p.grad) + offset;
  const auto* out = static_cast<const Element*>(p.out) + row * p.value_dim;
  float sum = 0;
  for (int64_t e = threadIdx.x % 32; e < p.value_dim; e += 32) {
    sum += to_float(grad[e]) * to_float(out[e]);
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    sum += shuffle_xor(sum, mask);
  }
  if (threadIdx.x % 32 == 0) {
    p.deltas[row] = p.mask.ignores(batch, query) ? 0.0f : sum;
  }
}

// One thread for each column of each code of a sequence.
__global__ void __launch_bounds__(kThreads) sum_code_segments(SumSegments p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
                columns = max(p.far_head_dim, p.value_dim);
  const int64_t column = i % columns, code = i / columns % p.num_codes, head = i / columns / p.num_codes % p.kv_heads;
  const int64_t number = i / columns / p.num_codes / p.kv_heads;
  if (number >= p.num_sequences()) {
    return;
  }
  const Sequence sequence = sequence_of(p, number);
  const int64_t count = max(divide_up(sequence.length, p.code_segment), int64_t{1});
  const int64_t first =
      (sequence.batch * p.kv_heads + head) * p.num_segments() + sequence.first_piece(p, p.code_segment);
  if (column < p.far_head_dim) {
    float* dcodewords = p.dcodewords + (first * p.num_codes + code) * p.far_head_dim + column;
    float sum = 0;
    for (int64_t segment = 0; segment < count; ++segment) {
      sum += dcodewords[segment * p.num_codes * p.far_head_dim];
    }
    *dcodewords = sum;
  }
  if (column < p.value_dim && p.later != nullptr) {
    const auto place = [&](int64_t segment) { return ((first + segment) * p.num_codes + code) * p.value_dim + column; };
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

// The gradient of a key's value from queries that are in other segments than the key. The gradient kernels have added
// only those of the key's own segment.
struct OtherSegments {
  const FinishKeys& p;
  const float *later, *earlier;  // value_dim columns, or null

  LONGVQ_DEVICE OtherSegments(
      const FinishKeys& problem, const Sequence& sequence, int64_t head, int64_t key, int64_t code)
      : p(problem), later(nullptr), earlier(nullptr) {
    if (p.later == nullptr) {
      return;
    }
    const int64_t row =
        (sequence.batch * p.kv_heads + head) * p.num_pieces(p.code_segment) + sequence.first_piece(p, p.code_segment);
    const auto place = [&](int64_t segment) { return ((row + segment) * p.num_codes + code) * p.value_dim; };
    const int64_t reach = max(p.window, int64_t{1});
    // The first far field after the key that contains it, and the last one before the key.
    const int64_t first = p.all_far ? 0 : (key + reach - 1) / kFarBlock + 1;
    const int64_t last = (key - reach + 1) / kFarBlock - 1;
    if (first * kFarBlock < sequence.length) {
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

// One warp for each key.
template <typename Element>
__global__ void __launch_bounds__(kThreads) finish_keys(FinishKeys p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t key = row % p.length, batch_head = row / p.length, batch = batch_head / p.kv_heads;
  if (batch >= p.batch) {
    return;  // the whole warp
  }
  const bool ignored = p.mask.ignores(batch, key);
  const Sequence sequence = sequence_at(p, key, batch);
  const int64_t segment = batch_head * p.num_pieces(p.code_segment) + sequence.first_piece(p, p.code_segment);
  const int64_t far_field = p.offsets == nullptr ? batch_head : batch_head * p.documents + sequence.number;
  const int64_t code = min(max(p.codes[row], int64_t{0}), p.num_codes - 1);
  const bool shares = p.dcodewords != nullptr && !ignored;
  const auto add_share = [&](float value, int64_t column) {
    if (shares) {
      const int64_t place = far_field * padded_codes(p.num_codes) + code;
      value += p.means[place * padded_value_dim(p.far_head_dim) + column];
      value += p.dcodewords[(segment * p.num_codes + code) * p.far_head_dim + column] / p.counts[place];
    }
    return value;
  };
  Element* dk = static_cast<Element*>(p.dk) + row * p.head_dim;
  for (int64_t c = threadIdx.x % 32; c < p.head_dim; c += 32) {
    const float inside = p.dk_inside[row * p.head_dim + c];
    store(dk + c, p.has_far_qk ? inside : add_share(inside, c));
  }
  if (p.has_far_qk) {
    Element* dfar_k = static_cast<Element*>(p.dfar_k) + row * p.far_head_dim;
    for (int64_t c = threadIdx.x % 32; c < p.far_head_dim; c += 32) {
      store(dfar_k + c, add_share(0, c));
    }
  }
  const OtherSegments others(p, sequence, batch_head % p.kv_heads, key - sequence.start, code);
  Element* dv = static_cast<Element*>(p.dv) + row * p.value_dim;
  for (int64_t e = threadIdx.x % 32; e < p.value_dim; e += 32) {
    const int64_t place = row * p.value_dim + e;
    const float after = p.dv_far_after != nullptr ? p.dv_far_after[place] : 0.0f;
    store(dv + e, p.dv_near[place] + p.dv_far_before[place] + after + (ignored ? 0.0f : others.at(e)));
  }
}

// A grid with a warp for each row.
dim3 grid_of_rows(int64_t count) {
  return dim3(static_cast<unsigned>(divide_up(count, kWarps)));
}

}  // namespace

int longvq_cuda_deltas(const Deltas* problem, void* stream) {
  const Deltas& p = *problem;
  return for_dtype(p.type, [&](auto element) {
    const dim3 grid = grid_of_rows(p.batch * p.heads * p.length);
    return launch<make_deltas<decltype(element)>>(grid, kThreads, 0, stream, p);
  });
}

int longvq_cuda_sum_segments(const SumSegments* problem, void* stream) {
  const SumSegments& p = *problem;
  const int64_t threads =
      p.num_sequences() * p.kv_heads * p.num_codes * (p.far_head_dim > p.value_dim ? p.far_head_dim : p.value_dim);
  const dim3 grid(static_cast<unsigned>(divide_up(threads, kThreads)));
  return launch<sum_code_segments>(grid, kThreads, 0, stream, p);
}

int longvq_cuda_finish_keys(const FinishKeys* problem, void* stream) {
  const FinishKeys& p = *problem;
  return for_dtype(p.type, [&](auto element) {
    const dim3 grid = grid_of_rows(p.batch * p.kv_heads * p.length);
    return launch<finish_keys<decltype(element)>>(grid, kThreads, 0, stream, p);
  });
}

int longvq_cuda_attention_gradients(const AttentionGradients* problem, void* stream) {
  const Attention& p = problem->forward;
  if (p.batch > kMaxGrid || p.batch * p.num_pieces(problem->code_segment) > kMaxGrid) {
    return kUnsupported;
  }
  switch (p.type) {
    case ElementType::kFloat:
      return attention_gradients_float(*problem, stream);
    case ElementType::kBFloat16:
      return attention_gradients_bfloat16(*problem, stream);
    case ElementType::kHalf:
      return attention_gradients_half(*problem, stream);
  }
  return kUnsupported;
}

}  // namespace longvq::cuda
