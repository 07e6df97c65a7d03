// Gradients of the scan's parameters summed over the segments, in their order.
#include "../common/dispatch.h"

namespace longvq::cuda {
namespace {

__global__ void __launch_bounds__(128) sum_gradients(SumScanGradients p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t count = p.modes.channels * p.modes.modes;
  if (i < count) {
    double sums[4] = {};
    for (int64_t row = 0; row < p.segments; ++row) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sums[k] += p.dmodes[(row * count + i) * 4 + k];
      }
    }
    const int64_t width = p.modes.complex_modes ? 2 : 1;
    p.dweight[i * width] = static_cast<float>(sums[0]);
    p.dlog_decay[i * width] = static_cast<float>(sums[2]);
    if (p.modes.complex_modes) {
      p.dweight[i * width + 1] = -static_cast<float>(sums[1]);
      p.dlog_decay[i * width + 1] = -static_cast<float>(sums[3]);
    }
  }
  if (p.dskip_sum != nullptr && i < p.modes.channels) {
    double sum = 0;
    for (int64_t row = 0; row < p.segments; ++row) {
      sum += p.dskip[row * p.modes.channels + i];
    }
    p.dskip_sum[i] = static_cast<float>(sum);
  }
}

}  // namespace

int longvq_cuda_sum_scan_gradients(const SumScanGradients* problem, void* stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(problem->modes.channels * problem->modes.modes, 128)));
  return launch<sum_gradients>(grid, 128, 0, stream, *problem);
}

}  // namespace longvq::cuda
