// The tables of the scan: powers of the decays by repeated multiplication in double precision, rounded once.
//
// A chunk of T steps adds Σ_t λ^(T−1−t) u_t to the state. Its output is Re Σ_n w_n λ_n^(t+1) x_n, with x the state
// before the chunk, plus Σ_{s≤t} K[t−s] u_s from inside the chunk. The adjoint has the weight on the other side: w_n
// λ_n^(T−t) into the state and λ_n^t out of it. The gradients of the parameters need the powers λ^(T−1−t) and λ^(t+1),
// and these powers times their exponents. A complex number takes two columns, or two rows, of a table.
#include "../common/dispatch.h"
#include "complex_modes.h"
#include "table_layout.h"

namespace longvq::cuda {
namespace {

constexpr int kThreads = 32;
constexpr int kSteps = kScanSteps;
using ComplexDouble = Complex<double>;

LONGVQ_DEVICE ComplexDouble multiply(ComplexDouble x, ComplexDouble y) {
  return multiply_add(x, y, {0, 0});
}

template <typename Operand, typename T>
LONGVQ_DEVICE void set(const T& tile, int row, int column, double x) {
  uint16_t terms[Operand::kTerms];
  Operand::split(static_cast<float>(x), terms);
  for (int i = 0; i < Operand::kTerms; ++i) {
    *tile.at(i, row, column) = terms[i];
  }
}

template <typename Operand, typename T>
LONGVQ_DEVICE void set_pair(const T& tile, int row, int column, ComplexDouble x) {
  set<Operand>(tile, row, column, x.re);
  set<Operand>(tile, row, column + 1, x.im);
}

// Writes the powers of one mode into the tables, and adds its terms of K to `kernel`. A null kernel: a padding mode,
// all zero.
template <typename Operand>
LONGVQ_DEVICE void set_powers(
    uint16_t* tables, ScanUse use, int group, int column, ComplexDouble decay, ComplexDouble weight, double* kernel) {
  using Layout = ScanLayout<Operand::kTerms>;
  const ComplexDouble nothing{0, 0}, one = kernel == nullptr ? nothing : ComplexDouble{1, 0};
  ComplexDouble power = one;
  for (int t = 0; t < kSteps; ++t) {
    const ComplexDouble next = multiply(power, decay);
    if (use == ScanUse::kGradients) {
      const ComplexDouble more{t * power.re, t * power.im}, next_more{(t + 1) * next.re, (t + 1) * next.im};
      set_pair<Operand>(Layout::of_gradients(tables, group, 0), kSteps - 1 - t, column, power);
      set_pair<Operand>(Layout::of_gradients(tables, group, 1), kSteps - 1 - t, column, more);
      set_pair<Operand>(Layout::of_gradients(tables, group, 2), t, column, next);
      set_pair<Operand>(Layout::of_gradients(tables, group, 3), t, column, next_more);
    } else {
      const bool adjoint = use == ScanUse::kAdjoint;
      const ComplexDouble left = adjoint ? power : multiply(weight, next);
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
  using Layout = ScanLayout<Operand::kTerms>;
  const int64_t channel = blockIdx.x, modes = p.modes.modes, padded = padded_modes(modes);
  const bool gradients = p.use == ScanUse::kGradients;
  const int64_t size =
      gradients ? scan_gradient_table_size(modes, Operand::kTerms) : scan_table_size(modes, Operand::kTerms);
  uint16_t* tables = p.tables + channel * size;
  double* kernel = reinterpret_cast<double*>(shared_memory());  // (kThreads, kSteps): the terms of each thread
  double* mine = kernel + threadIdx.x * kSteps;
  for (int l = 0; l < kSteps; ++l) {
    mine[l] = 0;
  }
  for (int64_t mode = threadIdx.x; mode < padded; mode += kThreads) {
    const bool valid = mode < modes;  // padding modes are zero
    const ComplexDouble decay = valid ? decay_of(p.modes, channel, mode, 1) : ComplexDouble{0, 0};
    const ComplexDouble weight = valid ? weight_of<double>(p.modes, channel, mode) : ComplexDouble{0, 0};
    const int group = static_cast<int>(mode / kScanGroup), column = static_cast<int>(mode % kScanGroup) * 2;
    set_powers<Operand>(tables, p.use, group, column, decay, weight, valid ? mine : nullptr);
    ComplexDouble power = decay;
    for (int squared = 1; squared < kSteps; squared *= 2) {
      power = multiply(power, power);
    }
    float* decays = p.decays + (channel * padded + mode) * kScanPowers * 2;
    for (int i = 0; i < kScanPowers; ++i) {
      const ComplexDouble value = i == 0 ? decay : power;
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
      set<Operand>(inside, k, l, 0);  // inputs after the output
    }
  }
}

}  // namespace

int longvq_cuda_scan_tables(const ScanTables* problem, void* stream) {
  if (problem->modes.modes > kScanMaxModes) {
    return kUnsupported;
  }
  const dim3 grid(static_cast<unsigned>(problem->modes.channels));
  return for_dtype(problem->type, [&](auto element) {
    using Operand = ScanOperand<decltype(element)>;
    return launch<make_tables<Operand>>(grid, kThreads, sizeof(double) * kThreads * kSteps, stream, *problem);
  });
}

}  // namespace longvq::cuda
