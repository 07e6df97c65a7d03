// Compiled once per instruction set, with LONGVQ_ISA set to its name; common/simd.h says what such a file may include.
//
// A step reads each parameter and each state once, and memory limits its speed. So lanes hold modes, in the order in
// which modes lie in memory.
#include "step_kernel.h"

#include <utility>

#include "../../common/simd.h"

namespace longvq {
namespace {

// Registers hold pairs (re, im). These functions copy the first lane of each pair to both of its lanes, copy the second
// lane to both, or exchange the two.
template <std::size_t... I>
inline Floats first_of_pairs(Floats x, std::index_sequence<I...>) {
  return lanes_of(x, x, std::index_sequence<(I & ~std::size_t{1})...>{});
}
template <std::size_t... I>
inline Floats second_of_pairs(Floats x, std::index_sequence<I...>) {
  return lanes_of(x, x, std::index_sequence<(I | 1)...>{});
}
template <std::size_t... I>
inline Floats exchanged_pairs(Floats x, std::index_sequence<I...>) {
  return lanes_of(x, x, std::index_sequence<(I ^ 1)...>{});
}

template <std::size_t... I>
inline Floats alternating(float even, float odd, std::index_sequence<I...>) {
  return Floats{(I & 1 ? odd : even)...};
}

constexpr std::make_index_sequence<kLanes> kOrder{};

float complex_step(
    const float* decay, const float* weight, const float* state, float u, int64_t modes, float* new_state) {
  const Floats inputs = alternating(u, 0.0f, kOrder), minus_plus = alternating(-1.0f, 1.0f, kOrder);
  const int64_t floats = 2 * modes;
  Floats total{};  // products of weight and state by lane; those of imaginary parts are subtracted at the end
  int64_t i = 0;
  for (; i + kLanes <= floats; i += kLanes) {
    const Floats lambda = load<Floats>(decay + i), x = load<Floats>(state + i);
    const Floats rotated = exchanged_pairs(x, kOrder) * minus_plus;
    const Floats next = inputs + first_of_pairs(lambda, kOrder) * x + second_of_pairs(lambda, kOrder) * rotated;
    store(new_state + i, next);
    total += load<Floats>(weight + i) * next;
  }
  float y = -sum_of(total * minus_plus);
  for (; i < floats; i += 2) {
    const float re = u + decay[i] * state[i] - decay[i + 1] * state[i + 1];
    const float im = decay[i] * state[i + 1] + decay[i + 1] * state[i];
    new_state[i] = re;
    new_state[i + 1] = im;
    y += weight[i] * re - weight[i + 1] * im;
  }
  return y;
}

float real_step(const float* decay, const float* weight, const float* state, float u, int64_t modes, float* new_state) {
  const Floats inputs = Floats{} + u;
  Floats total{};
  int64_t i = 0;
  for (; i + kLanes <= modes; i += kLanes) {
    const Floats next = inputs + load<Floats>(decay + i) * load<Floats>(state + i);
    store(new_state + i, next);
    total += load<Floats>(weight + i) * next;
  }
  float y = sum_of(total);
  for (; i < modes; ++i) {
    new_state[i] = u + decay[i] * state[i];
    y += weight[i] * new_state[i];
  }
  return y;
}

}  // namespace

extern const StepKernel LONGVQ_JOIN(step_kernel_, LONGVQ_ISA) = {&complex_step, &real_step};

}  // namespace longvq
