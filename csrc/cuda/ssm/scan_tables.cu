// The tables of the scan, in double precision: powers of the decays by repeated multiplication, rounded once.
//
// A chunk of T steps gives its state S = Σ_t λ^(T−1−t) u_t, takes Re Σ_n w_n λ_n^(t+1) x_n out of the state before it,
// and adds Σ_{s≤t} K[t−s] u_s from inside. Its adjoint has the weight on the other side, w_n λ_n^(T−t) and λ_n^t. The
// gradients of the parameters need powers λ^(T−1−t) and λ^(t+1), and those times their exponents. Complex numbers are
// two columns (or rows) of the tables.
#include "../common/dispatch.h"
#include "table_layout.h"

namespace longvq::cuda {
namespace {

constexpr int kThreads = 32;
constexpr int kSteps = kScanSteps;
using Number = Complex<double>;

LONGVQ_DEVICE Number multiply(Number x, Number y) {
  return multiply_add(x, y, {0, 0});
}

template <typename Operand, typename T>
LONGVQ_DEVICE void set(const T& tile, int row, int column, double x) {
  uint16_t parts[Operand::kParts];
  Operand::split(static_cast<float>(x), parts);
  for (int i = 0; i < Operand::kParts; ++i) {
    *tile.at(i, row, column) = parts[i];
  }
}

template <typename Operand, typename T>
LONGVQ_DEVICE void set_pair(const T& tile, int row, int column, Number x) {
  set<Operand>(tile, row, column, x.re);
  set<Operand>(tile, row, column + 1, x.im);
}

// The powers of a mode where the tables have them; adds those of its weight to K.
template <typename Operand>
LONGVQ_DEVICE void set_powers(
    uint16_t* tables, ScanUse use, int group, int column, Number decay, Number weight, double* kernel) {
  using Layout = ScanLayout<Operand::kParts>;
  const Number nothing{0, 0}, one = kernel == nullptr ? nothing : Number{1, 0};
  Number power = one;
  for (int t = 0; t < kSteps; ++t) {
    const Number next = multiply(power, decay);
    if (use == ScanUse::kGradients) {
      const Number more{t * power.re, t * power.im}, next_more{(t + 1) * next.re, (t + 1) * next.im};
      set_pair<Operand>(Layout::of_gradients(tables, group, 0), kSteps - 1 - t, column, power);
      set_pair<Operand>(Layout::of_gradients(tables, group, 1), kSteps - 1 - t, column, more);
      set_pair<Operand>(Layout::of_gradients(tables, group, 2), t, column, next);
      set_pair<Operand>(Layout::of_gradients(tables, group, 3), t, column, next_more);
    } else {
      const bool adjoint = use == ScanUse::kAdjoint;
      const Number left = adjoint ? power : multiply(weight, next);
      set_pair<Operand>(Layout::in(tables, group), kSteps - 1 - t, column, adjoint ? multiply(weight, next) : power);
      set<Operand>(Layout::out(tables, group), column, t, left.re);
      set<Operand>(Layout::out(tables, group), column + 1, t, -left.im);
      if (kernel != nullptr) {
        kernel[t] += multiply(weight, power).re;
      }
    }
    power = next;
  }
}

template <typename Operand>
__global__ void __launch_bounds__(kThreads) make_tables(ScanTables p) {
  using Layout = ScanLayout<Operand::kParts>;
  const int64_t channel = blockIdx.x, modes = p.modes.modes, padded = padded_modes(modes);
  const bool gradients = p.use == ScanUse::kGradients;
  const int64_t size =
      gradients ? scan_gradient_table_size(modes, Operand::kParts) : scan_table_size(modes, Operand::kParts);
  uint16_t* tables = p.tables + channel * size;
  double* kernel = reinterpret_cast<double*>(shared_memory());  // of each thread, (kThreads, kSteps)
  double* mine = kernel + threadIdx.x * kSteps;
  for (int l = 0; l < kSteps; ++l) {
    mine[l] = 0;
  }
  for (int64_t mode = threadIdx.x; mode < padded; mode += kThreads) {
    const bool there = mode < modes;  // others only pad: nothing goes in or out of them
    const Number decay = there ? decay_of(p.modes, channel, mode, 1) : Number{0, 0};
    const Number weight = there ? weight_of<double>(p.modes, channel, mode) : Number{0, 0};
    const int group = static_cast<int>(mode / kScanGroup), column = static_cast<int>(mode % kScanGroup) * 2;
    set_powers<Operand>(tables, p.use, group, column, decay, weight, there ? mine : nullptr);
    Number power = decay;
    for (int squared = 1; squared < kSteps; squared *= 2) {
      power = multiply(power, power);
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
  if (gradients) {
    return;
  }
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
    return launch<make_tables<Operand>>(grid, kThreads, sizeof(double) * kThreads * kSteps, stream, *problem);
  });
}

}  // namespace longvq::cuda
