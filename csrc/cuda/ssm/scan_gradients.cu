// Gradients of the scan's parameters: the kernels that make the states of segments, the gradients of each segment, and
// their sums.
#include "scan_gradients.h"

#include <initializer_list>

namespace longvq::cuda {
namespace {

template <typename Element>
__global__ void __launch_bounds__(ScanGradientBlock<Element>::kThreads) differentiate_scan(ScanGradients g, Pass pass) {
  const Scan& p = g.scan;
  const Piece piece = piece_of(p, p.segment_length, blockIdx.z, blockIdx.y);
  ScanGradientKernel<Element> kernel(g, piece);
  if (piece.exists(p.segment_length) && !(pass == Pass::kStates && kernel.is_last())) {
    kernel.run(pass);
  }
}

// In: the states that segments end with when they start from zero. Out: the states that segments start with. One thread
// for each mode of a sequence.
__global__ void __launch_bounds__(128) enter_gradient_segments(ScanGradients g) {
  const Scan& p = g.scan;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, modes = p.modes.modes;
  if (i >= p.num_sequences() * p.modes.channels * modes) {
    return;
  }
  const int64_t mode = i % modes, row = i / modes, channel = row % p.modes.channels;
  const float steps = static_cast<float>(p.segment_length);
  const Complex<double> exact = decay_of(p.modes, channel, mode, steps);
  const ComplexFloat decay{static_cast<float>(exact.re), static_cast<float>(exact.im)};
  const Sequence sequence = sequence_of(p, row / p.modes.channels);
  DualState now{{0, 0}, {0, 0}};
  if (p.initial_state != nullptr) {
    now.x = read_mode<float>(p.modes, p.initial_state, i);
  }
  const int64_t first =
      (sequence.batch * p.modes.channels + channel) * p.num_segments() + sequence.first_piece(p, p.segment_length);
  ComplexFloat* states = reinterpret_cast<ComplexFloat*>(g.segment_states) + (first * modes + mode) * 2;
  for (int64_t segment = 0; segment == 0 || segment * p.segment_length < sequence.length; ++segment) {
    ComplexFloat* state = states + segment * modes * 2;
    const bool last = (segment + 1) * p.segment_length >= sequence.length;
    const DualState left = last ? DualState{{0, 0}, {0, 0}} : DualState{state[0], state[1]};
    state[0] = now.x, state[1] = now.z;
    now = advance(decay, steps, now, left);
  }
}

// Sums the gradients over the segments, in their order. One thread for each mode.
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

int longvq_cuda_scan_gradients(const ScanGradients* problem, void* stream) {
  const Scan& p = problem->scan;
  if (p.modes.modes > kScanMaxModes || p.batch > kMaxGrid || p.num_segments() > kMaxGrid) {
    return kUnsupported;
  }
  return for_dtype(p.type, [&](auto element) {
    using S = ScanGradientKernel<decltype(element)>;
    constexpr auto kernel = differentiate_scan<decltype(element)>;
    return run_segments<kernel, enter_gradient_segments, S>(
        p, *problem, problem->segment_states, S::bytes(p.modes.modes), stream);
  });
}

int longvq_cuda_sum_scan_gradients(const SumScanGradients* problem, void* stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(problem->modes.channels * problem->modes.modes, 128)));
  return launch<sum_gradients>(grid, 128, 0, stream, *problem);
}

}  // namespace longvq::cuda
