// Gradients of the scan's parameters: segments at the same time, from states that are made first, see
// scan_differentiating.h.
#include "scan_gradients.h"

namespace longvq::cuda {
namespace {

template <typename Element>
__global__ void __launch_bounds__(DifferentiatingBlock<Element>::kThreads)
    differentiate_scan(ScanGradients g, Pass pass) {
  const Scan& p = g.scan;
  const Piece piece = piece_of(p, p.segment_length, blockIdx.z, blockIdx.y);
  ScanDifferentiating<Element> differentiating(g, piece);
  if (piece.there(p.segment_length) && !(pass == Pass::kStates && differentiating.is_last())) {
    differentiating.run(pass);
  }
}

// From the states that segments leave, starting from zero, to those that enter them.
__global__ void __launch_bounds__(128) enter_gradient_segments(ScanGradients g) {
  const Scan& p = g.scan;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, modes = p.modes.modes;
  if (i >= p.sequences() * p.modes.channels * modes) {
    return;
  }
  const int64_t mode = i % modes, row = i / modes, channel = row % p.modes.channels;
  const float steps = static_cast<float>(p.segment_length);
  const Complex<double> exact = decay_of(p.modes, channel, mode, steps);
  const Number decay{static_cast<float>(exact.re), static_cast<float>(exact.im)};
  const Sequence of = sequence_of(p, row / p.modes.channels);
  const int width = p.modes.complex_modes ? 2 : 1;
  Pair now{{0, 0}, {0, 0}};
  if (p.initial_state != nullptr) {
    now.x = {p.initial_state[i * width], p.modes.complex_modes ? p.initial_state[i * width + 1] : 0.0f};
  }
  const int64_t first = (of.batch * p.modes.channels + channel) * p.segments() + of.first_piece(p, p.segment_length);
  Number* states = reinterpret_cast<Number*>(g.segment_states) + (first * modes + mode) * 2;
  for (int64_t segment = 0; segment == 0 || segment * p.segment_length < of.length; ++segment) {
    Number* state = states + segment * modes * 2;
    const bool last = (segment + 1) * p.segment_length >= of.length;
    const Pair left = last ? Pair{{0, 0}, {0, 0}} : Pair{state[0], state[1]};
    state[0] = now.x, state[1] = now.z;
    now = move(decay, steps, now, left);
  }
}

}  // namespace

int longvq_cuda_scan_gradients(const ScanGradients* problem, void* stream) {
  const Scan& p = problem->scan;
  if (p.modes.modes > kScanMaxModes || p.batch > kMaxGrid || p.segments() > kMaxGrid) {
    return kNotCovered;
  }
  return for_element(p.type, [&](auto element) {
    using S = ScanDifferentiating<decltype(element)>;
    constexpr auto kernel = differentiate_scan<decltype(element)>;
    return run_segments<kernel, enter_gradient_segments, S>(
        p, *problem, problem->segment_states, S::bytes(p.modes.modes), stream);
  });
}

}  // namespace longvq::cuda
