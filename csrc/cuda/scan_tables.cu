// The tables of the scan, in double precision: powers of the decays by repeated multiplication, rounded once.
//
// A chunk of T steps gives its state S = Σ_t λ^(T−1−t) u_t, takes Re Σ_n w_n λ_n^(t+1) x_n out of the state before it,
// and adds Σ_{s≤t} K[t−s] u_s from inside. Complex numbers are two columns (or rows) of the tables.
#include "cover.h"
#include "scan_layout.h"

namespace longvq::cuda {
namespace {

constexpr int kThreads = 32;
constexpr int kSteps = kScanSteps;
using Number = Complex<double>;

LONGVQ_DEVICE Number multiply(Number x, Number y) { return multiply_add(x, y, {0, 0}); }

LONGVQ_DEVICE Number weight_of(const ScanModes& m, int64_t channel, int64_t mode) {
  const int64_t i = channel * m.modes + mode;
  return {m.complex_modes ? m.weight[2 * i] : m.weight[i], m.complex_modes ? m.weight[2 * i + 1] : 0.0};
}

template <typename Operand, typename T>
LONGVQ_DEVICE void set(const T& tile, int row, int column, double x) {
  uint16_t parts[Operand::kParts];
  Operand::split(static_cast<float>(x), parts);
  for (int i = 0; i < Operand::kParts; ++i) {
    *tile.at(i, row, column) = parts[i];
  }
}

template <typename Operand>
__global__ void __launch_bounds__(kThreads) make_tables(ScanTables p) {
  using Layout = ScanLayout<Operand::kParts>;
  const int64_t channel = blockIdx.x, modes = p.modes.modes, padded = padded_modes(modes);
  uint16_t* tables = p.tables + channel * scan_table_size(modes, Operand::kParts);
  double* kernel = reinterpret_cast<double*>(shared_memory());  // of each thread, (kThreads, kSteps)
  double* mine = kernel + threadIdx.x * kSteps;
  for (int l = 0; l < kSteps; ++l) {
    mine[l] = 0;
  }
  for (int64_t mode = threadIdx.x; mode < padded; mode += kThreads) {
    const bool there = mode < modes;
    const Number decay = there ? decay_of(p.modes, channel, mode, 1) : Number{0, 0};
    const Number weight = there ? weight_of(p.modes, channel, mode) : Number{0, 0};
    const int group = static_cast<int>(mode / kScanGroup), column = static_cast<int>(mode % kScanGroup) * 2;
    const auto in = Layout::in(tables, group), out = Layout::out(tables, group);
    Number power{there ? 1.0 : 0.0, 0};
    for (int t = 0; t < kSteps; ++t) {
      set<Operand>(in, kSteps - 1 - t, column, power.re);
      set<Operand>(in, kSteps - 1 - t, column + 1, power.im);
      mine[t] += multiply(weight, power).re;
      power = multiply(power, decay);
      const Number left = multiply(weight, power);
      set<Operand>(out, column, t, left.re);
      set<Operand>(out, column + 1, t, -left.im);
    }
    float* decays = p.decays + (channel * padded + mode) * kScanPowers * 2;
    for (int i = 0; i < kScanPowers; ++i) {
      const Number value = i == 0 ? decay : power;
      decays[2 * i] = static_cast<float>(value.re);
      decays[2 * i + 1] = static_cast<float>(value.im);
      for (int twice = 0; i > 0 && twice < (i == 1 ? 2 : 1); ++twice) {
        power = multiply(power, power);  // T, 4 T, 8 T, 16 T
      }
    }
  }
  __syncthreads();
  const int l = threadIdx.x;
  double sum = l == 0 && p.modes.skip != nullptr ? p.modes.skip[channel] : 0.0;
  for (int thread = 0; thread < kThreads; ++thread) {
    sum += kernel[thread * kSteps + l];
  }
  const auto inside = Layout::inside(tables);
  for (int k = 0; k < 16; ++k) {
    if (k + l < kSteps) {
      set<Operand>(inside, k, k + l, sum);
    }
    if (l < k) {
      set<Operand>(inside, k, l, 0);  // what is later than the output
    }
  }
}

}  // namespace

int longvq_cuda_scan_tables(const ScanTables* problem, void* stream) {
  if (problem->modes.modes > kScanMaxModes) {
    return kNotCovered;
  }
  const dim3 grid(static_cast<unsigned>(problem->modes.channels));
  return for_element(problem->type, [&](auto element) {
    using Operand = ScanOperand<decltype(element)>;
    return launch(make_tables<Operand>, grid, kThreads, sizeof(double) * kThreads * kSteps, stream, *problem);
  });
}

}  // namespace longvq::cuda
