#include "step.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "../../common/cpu_capability.h"
#include "step_kernel.h"

namespace longvq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMinModesPerThread = 1 << 15;  // below this starting a thread costs more than it saves

LONGVQ_DEFINE_KERNEL_OF_THIS_CPU(StepKernel, step_kernel)

template <typename Scalar>
void step(
    const Tensor& u, const Tensor& decay, const Tensor& weight, const std::optional<Tensor>& skip, const Tensor& state,
    bool complex_modes, const Tensor& y, const Tensor& new_state) {
  const int64_t batch = u.size(0), channels = u.size(1), modes = decay.size(1);
  const int64_t floats = complex_modes ? 2 * modes : modes;
  const auto call = complex_modes ? kernel_of_this_cpu().complex_modes : kernel_of_this_cpu().real_modes;
  const auto* inputs = static_cast<const Scalar*>(u.const_data_ptr());
  const auto* decays = static_cast<const float*>(decay.const_data_ptr());
  const auto* weights = static_cast<const float*>(weight.const_data_ptr());
  const auto* states = static_cast<const float*>(state.const_data_ptr());
  const auto* skips = skip.has_value() ? static_cast<const float*>(skip->const_data_ptr()) : nullptr;
  const int64_t skip_stride = skip.has_value() ? skip->stride(0) : 0;
  auto* outputs = static_cast<Scalar*>(y.mutable_data_ptr());
  auto* new_states = static_cast<float*>(new_state.mutable_data_ptr());
  const int64_t row_stride = u.stride(0), channel_stride = u.stride(1);
  const int64_t grain = std::max<int64_t>(1, kMinModesPerThread / modes);
  torch::stable::parallel_for(0, batch * channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / channels, channel = i % channels;
      const float input = static_cast<float>(inputs[row * row_stride + channel * channel_stride]);
      float sum = call(
          decays + channel * floats, weights + channel * floats, states + i * floats, input, modes,
          new_states + i * floats);
      if (skips != nullptr) {
        sum += skips[channel * skip_stride] * input;
      }
      outputs[i] = static_cast<Scalar>(sum);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> ssm_step_cpu(
    const Tensor& u, const Tensor& decay, const Tensor& weight, const std::optional<Tensor>& skip,
    const Tensor& state) {
  // Python has checked them with better messages: these only keep wrong calls of the bare operator from memory.
  STD_TORCH_CHECK(u.dim() == 2 && decay.dim() == 2, "ssm_step: u must be (B, H) and decay (H, N)");
  const int64_t batch = u.size(0), channels = u.size(1), modes = decay.size(1);
  const ScalarType family = decay.scalar_type();
  STD_TORCH_CHECK(
      family == ScalarType::Float || family == ScalarType::ComplexFloat,
      "ssm_step: the compiled CPU kernel takes float32 or complex64 modes");
  STD_TORCH_CHECK(decay.size(0) == channels && modes >= 1, "ssm_step: decay must be (H, N) for this u, N >= 1");
  STD_TORCH_CHECK(
      weight.dim() == 2 && weight.size(0) == channels && weight.size(1) == modes && weight.scalar_type() == family,
      "ssm_step: weight must have the shape and dtype of decay");
  STD_TORCH_CHECK(
      state.dim() == 3 && state.size(0) == batch && state.size(1) == channels && state.size(2) == modes &&
          state.scalar_type() == family,
      "ssm_step: state must be (B, H, N) in the dtype of decay");
  STD_TORCH_CHECK(
      !skip.has_value() ||
          (skip->is_cpu() && skip->dim() == 1 && skip->size(0) == channels && skip->scalar_type() == ScalarType::Float),
      "ssm_step: skip must be (H,), float32 on the CPU");
  STD_TORCH_CHECK(
      u.is_cpu() && decay.is_cpu() && weight.is_cpu() && state.is_cpu(), "ssm_step: all tensors must be on the CPU");

  const Tensor y = torch::stable::new_empty(u, {batch, channels}, u.scalar_type());
  const Tensor new_state = torch::stable::new_empty(state, {batch, channels, modes}, family);
  if (batch == 0 || channels == 0) {
    return {y, new_state};
  }
  const auto run = [&](auto scalar) {
    step<decltype(scalar)>(
        u, torch::stable::contiguous(decay), torch::stable::contiguous(weight), skip, torch::stable::contiguous(state),
        family == ScalarType::ComplexFloat, y, new_state);
  };
  switch (u.scalar_type()) {
    case ScalarType::Float:
      run(float{});
      break;
    case ScalarType::BFloat16:
      run(c10::BFloat16{});
      break;
    case ScalarType::Half:
      run(c10::Half{});
      break;
    default:
      STD_TORCH_CHECK(false, "ssm_step: the compiled CPU kernel takes u in float32, bfloat16 or float16");
  }
  return {y, new_state};
}

}  // namespace longvq
