#include "step.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "../../common/check_tensor.h"
#include "../../common/cpu_capability.h"
#include "step_kernel.h"

namespace longvq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "ssm_step";
constexpr int64_t kMinModesPerThread = 1 << 15;  // below this, starting a thread costs more than it saves

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
  // Python checks the same first, with better messages. Calls through torch.ops skip Python, so memory safety depends
  // on these checks.
  const ScalarType family = decay.scalar_type();
  STD_TORCH_CHECK(
      family == ScalarType::Float || family == ScalarType::ComplexFloat, kOp,
      ": decay must be float32 or complex64 for the compiled CPU kernel, got ", dtype_name(family));
  check_tensor(kOp, "u", u, u.scalar_type(), "(B, H)", {kAnySize, kAnySize});
  const int64_t batch = u.size(0), channels = u.size(1);
  check_tensor(kOp, "decay", decay, family, "(H, N)", {channels, kAnySize});
  const int64_t modes = decay.size(1);
  STD_TORCH_CHECK(modes >= 1, kOp, ": decay must have at least one mode N, got ", modes);
  check_tensor(kOp, "weight", weight, family, "(H, N)", {channels, modes});
  check_tensor(kOp, "state", state, family, "(B, H, N)", {batch, channels, modes});
  if (skip.has_value()) {
    check_tensor(kOp, "skip", *skip, ScalarType::Float, "(H,)", {channels});
  }

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
      STD_TORCH_CHECK(
          false, kOp, ": u must be float32, bfloat16 or float16 for the compiled CPU kernel, got ",
          dtype_name(u.scalar_type()));
  }
  return {y, new_state};
}

}  // namespace longvq
