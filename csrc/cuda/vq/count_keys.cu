// How many keys each query may attend: a block of threads for a sequence, each thread a stretch of it.
#include "../common/dispatch.h"
#include "../common/pieces.h"

namespace longvq::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) count_keys(CountKeys p) {
  int* counts = reinterpret_cast<int*>(shared_memory());
  const Sequence of = sequence_of(p, blockIdx.x);
  const int64_t stretch = divide_up(of.length, kThreads);
  const int64_t first = of.start + min(threadIdx.x * stretch, of.length);
  const int64_t last = min(first + stretch, of.start + of.length);
  const auto counted = [&](int64_t key) {
    return p.ignored == nullptr || p.ignored[of.batch * p.ignored_batch + key * p.ignored_length] == 0;
  };
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
    p.units[of.batch * p.length + key] = 1.0f / static_cast<float>(max(count, 1));
  }
}

}  // namespace

int longvq_cuda_count_keys(const CountKeys* problem, void* stream) {
  if (problem->sequences() == 0 || problem->length == 0) {
    return 0;
  }
  const dim3 grid(static_cast<unsigned>(problem->sequences()));
  return launch<count_keys>(grid, kThreads, sizeof(int) * kThreads, stream, *problem);
}

}  // namespace longvq::cuda
