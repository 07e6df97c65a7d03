// Counts the keys that each query may attend. One block of threads for each sequence; each thread counts one stretch.
#include "../common/dispatch.h"
#include "../common/pieces.h"
#include "params.h"

namespace longvq::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) count_allowed_keys(CountAllowedKeys p) {
  int* counts = reinterpret_cast<int*>(shared_memory());
  const Sequence sequence = sequence_of(p, blockIdx.x);
  const int64_t stretch = divide_up(sequence.length, kThreads);
  const int64_t first = sequence.start + min(threadIdx.x * stretch, sequence.length);
  const int64_t last = min(first + stretch, sequence.start + sequence.length);
  const auto counted = [&](int64_t key) { return !p.mask.ignores(sequence.batch, key); };
  int count = 0;
  for (int64_t key = first; key < last; ++key) {
    count += counted(key);
  }
  counts[threadIdx.x] = count;
  __syncthreads();
  count = 0;
  for (int thread = 0; thread < (p.causal ? static_cast<int>(threadIdx.x) : kThreads); ++thread) {
    count += counts[thread];
  }
  for (int64_t key = first; key < last; ++key) {
    count += p.causal && counted(key);
    p.inverse_num_keys[sequence.batch * p.length + key] = 1.0f / static_cast<float>(max(count, 1));
  }
}

}  // namespace

int longvq_cuda_count_allowed_keys(const CountAllowedKeys* problem, void* stream) {
  if (problem->num_sequences() == 0 || problem->length == 0) {
    return 0;
  }
  const dim3 grid(static_cast<unsigned>(problem->num_sequences()));
  return launch<count_allowed_keys>(grid, kThreads, sizeof(int) * kThreads, stream, *problem);
}

}  // namespace longvq::cuda
