// The attention's backward: what comes before and after the kernels that are compiled for each type in files of their
// own.
#include "cover.h"

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

template <typename Element>
__global__ void __launch_bounds__(kThreads) finish_keys(FinishKeys p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t at = row % p.length, of = row / p.length, batch = of / p.heads;
  if (batch >= p.batch) {
    return;
  }
  const bool ignored = is_ignored(p.ignored, batch * p.ignored_batch + at * p.ignored_length);
  const int64_t code = min(max(p.code_of_key[row], int64_t{0}), p.codes - 1), columns = p.far_first + p.far_depth;
  Element* dk = static_cast<Element*>(p.dk) + row * columns;
  for (int64_t c = threadIdx.x % 32; c < columns; c += 32) {
    float value = c < p.near_depth ? p.dk_inside[row * p.near_depth + c] : 0.0f;
    const int64_t far = c - p.far_first;
    if (far >= 0 && p.dcodes != nullptr && !ignored) {
      const int64_t padded = padded_codes(p.codes);
      const float number = p.numbers[of * padded + code];
      value += p.means[(of * padded + code) * value_pitch(p.far_depth) + far];
      value += p.dcodes[(of * p.codes + code) * p.far_depth + far] / number;
    }
    store(dk + c, value);
  }
  Element* dv = static_cast<Element*>(p.dv) + row * p.values;
  for (int64_t e = threadIdx.x % 32; e < p.values; e += 32) {
    store(dv + e, p.dv_near[row * p.values + e] + p.dv_far[row * p.values + e]);
  }
}

dim3 rows(int64_t count) { return dim3(static_cast<unsigned>(divide_up(count, kWarps))); }

}  // namespace

int longvq_cuda_deltas(const Deltas* problem, void* stream) {
  const Deltas& p = *problem;
  return for_element(p.type, [&](auto element) {
    const dim3 grid = rows(p.batch * p.heads * p.length);
    return launch(make_deltas<decltype(element)>, grid, kThreads, 0, stream, p);
  });
}

int longvq_cuda_finish_keys(const FinishKeys* problem, void* stream) {
  const FinishKeys& p = *problem;
  return for_element(p.type, [&](auto element) {
    const dim3 grid = rows(p.batch * p.heads * p.length);
    return launch(finish_keys<decltype(element)>, grid, kThreads, 0, stream, p);
  });
}

int longvq_cuda_attention_gradients(const AttentionGradients* problem, void* stream) {
  if (problem->forward.batch > kMaxGrid) {
    return kNotCovered;
  }
  switch (problem->forward.type) {
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
