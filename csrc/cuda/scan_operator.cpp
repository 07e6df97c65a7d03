#include <algorithm>

#include "operators.h"

namespace longvq::cuda {
namespace {

constexpr const char* kOp = "ssm_scan";

bool is_complex(const Tensor& x) { return x.scalar_type() == ScalarType::ComplexFloat; }

void check_sizes(
    const Tensor& u, const Tensor& log_decay, const Tensor& weight, const OptionalTensor& skip,
    const OptionalTensor& initial_state, const OptionalTensor& mask) {
  STD_TORCH_CHECK(u.dim() == 3 && log_decay.dim() == 2, kOp, ": expected u (B, L, H) and log_decay (H, N)");
  const int64_t batch = u.size(0), length = u.size(1), channels = u.size(2), modes = log_decay.size(1);
  STD_TORCH_CHECK(
      log_decay.scalar_type() == ScalarType::Float || is_complex(log_decay), kOp,
      ": log_decay must be float32 or complex64");
  STD_TORCH_CHECK(
      log_decay.size(0) == channels && modes >= 1 && weight.dim() == 2 && weight.size(0) == channels &&
          weight.size(1) == modes && weight.scalar_type() == log_decay.scalar_type(),
      kOp, ": weight and log_decay must both be (H, N) and of one type");
  STD_TORCH_CHECK(
      !skip.has_value() ||
          (skip->dim() == 1 && skip->size(0) == channels && skip->scalar_type() == ScalarType::Float),
      kOp, ": skip must be (H,), float32");
  STD_TORCH_CHECK(
      !initial_state.has_value() ||
          (initial_state->dim() == 3 && initial_state->size(0) == batch && initial_state->size(1) == channels &&
           initial_state->size(2) == modes && initial_state->scalar_type() == log_decay.scalar_type()),
      kOp, ": initial_state must be (B, H, N), of the type of log_decay");
  STD_TORCH_CHECK(
      !mask.has_value() || (mask->dim() == 2 && mask->size(0) == batch && mask->size(1) == length &&
                            mask->scalar_type() == ScalarType::Bool),
      kOp, ": key_padding_mask must be (B, L), bool");
}

// As many pieces of a sequence at a time as fill a large GPU; each costs a second pass over its inputs.
int64_t segments_for(int64_t blocks, int64_t length) {
  constexpr int64_t kBlocks = 256, kLeast = 4 * kScanTile;
  const int64_t wanted = blocks >= kBlocks / 2 ? 1 : kBlocks / std::max<int64_t>(blocks, 1);
  return std::max<int64_t>(1, std::min(wanted, length / kLeast));
}

}  // namespace

std::tuple<Tensor, Tensor> ssm_scan(
    const Tensor& u, const Tensor& log_decay_given, const Tensor& weight_given, const OptionalTensor& skip_given,
    const OptionalTensor& initial_given, const OptionalTensor& mask, const OptionalTensor& cu_seqlens, bool reverse) {
  check_sizes(u, log_decay_given, weight_given, skip_given, initial_given, mask);
  STD_TORCH_CHECK(!cu_seqlens.has_value(), kOp, ": the CUDA kernels don't take packed documents yet");
  const ElementType type = type_of(kOp, u);
  const OnDeviceOf device(kOp, u);
  // Parameters are small. A lazily conjugated one is resolved by the copy.
  const Tensor log_decay = torch::stable::contiguous(log_decay_given);
  const Tensor weight = torch::stable::contiguous(weight_given);
  OptionalTensor skip, initial;
  Scan p{};
  p.modes = {u.size(2), log_decay.size(1), is_complex(log_decay), data_of<float>(log_decay), data_of<float>(weight), nullptr};
  if (skip_given.has_value()) {
    skip = torch::stable::contiguous(*skip_given);
    p.modes.skip = data_of<float>(*skip);
  }
  if (initial_given.has_value()) {
    initial = torch::stable::contiguous(*initial_given);
    p.initial_state = data_of<float>(*initial);
  }
  p.type = type, p.batch = u.size(0), p.length = u.size(1), p.reverse = reverse;
  p.u = u.const_data_ptr(), p.u_batch = u.stride(0), p.u_length = u.stride(1), p.u_channel = u.stride(2);
  if (mask.has_value()) {
    p.ignored = static_cast<const uint8_t*>(mask->const_data_ptr());
    p.ignored_batch = mask->stride(0), p.ignored_length = mask->stride(1);
  }
  const auto empty = [&](std::initializer_list<int64_t> sizes, ScalarType of) {
    return torch::stable::new_empty(u, sizes, of);
  };
  const int64_t channels = p.modes.channels, modes = p.modes.modes;
  Tensor y = empty({p.batch, p.length, channels}, u.scalar_type());
  Tensor state = empty({p.batch, channels, modes}, log_decay.scalar_type());
  if (p.batch == 0 || channels == 0) {
    return {y, state};
  }
  if (p.length == 0) {
    if (initial.has_value()) {
      torch::stable::copy_(state, *initial);
    } else {
      torch::stable::zero_(state);
    }
    return {y, state};
  }
  const int64_t parts = type == ElementType::kBFloat16 ? 1 : 3;
  const Tensor tables = empty({channels, scan_table_size(modes, parts)}, ScalarType::BFloat16);
  const Tensor decays = empty({channels, padded_modes(modes), kScanPowers, 2}, ScalarType::Float);
  const ScanTables making{p.modes, type, ScanUse::kScan, data_of<uint16_t>(tables), data_of<float>(decays)};
  check_launch(kOp, longvq_cuda_scan_tables(&making, device.stream()));
  p.tables = making.tables, p.decays = making.decays;

  const int64_t blocks = p.batch * ((channels + 7) / 8);
  p.segments = segments_for(blocks, p.length);
  p.segment_length = (p.length + p.segments * kScanTile - 1) / (p.segments * kScanTile) * kScanTile;
  p.segments = (p.length + p.segment_length - 1) / p.segment_length;
  const Tensor segment_states =
      empty({p.segments > 1 ? p.batch : 0, channels, p.segments, modes, 2}, ScalarType::Float);
  p.segment_states = p.segments > 1 ? data_of<float>(segment_states) : nullptr;
  p.y = y.mutable_data_ptr(), p.final_state = data_of<float>(state);
  check_launch(kOp, longvq_cuda_scan(&p, device.stream()));
  return {y, state};
}

}  // namespace longvq::cuda
