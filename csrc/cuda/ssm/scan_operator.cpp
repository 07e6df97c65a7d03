#include <algorithm>

#include "../operators.h"

namespace longvq::cuda {
namespace {

constexpr const char* kOp = "ssm_scan";

bool is_complex(const Tensor& x) {
  return x.scalar_type() == ScalarType::ComplexFloat;
}

void check_sizes(
    const Tensor& u, const Tensor& log_decay, const Tensor& weight, const OptionalTensor& skip,
    const OptionalTensor& initial_state, const OptionalTensor& mask, int64_t sequences) {
  STD_TORCH_CHECK(log_decay.dim() == 2, kOp, ": expected log_decay (H, N)");
  const int64_t batch = u.size(0), length = u.size(1), channels = u.size(2), modes = log_decay.size(1);
  STD_TORCH_CHECK(
      log_decay.scalar_type() == ScalarType::Float || is_complex(log_decay), kOp,
      ": log_decay must be float32 or complex64");
  STD_TORCH_CHECK(
      log_decay.size(0) == channels && modes >= 1 && weight.dim() == 2 && weight.size(0) == channels &&
          weight.size(1) == modes && weight.scalar_type() == log_decay.scalar_type(),
      kOp, ": weight and log_decay must both be (H, N) and of one type");
  STD_TORCH_CHECK(
      !skip.has_value() || (skip->dim() == 1 && skip->size(0) == channels && skip->scalar_type() == ScalarType::Float),
      kOp, ": skip must be (H,), float32");
  STD_TORCH_CHECK(
      !initial_state.has_value() ||
          (initial_state->dim() == 3 && initial_state->size(0) == sequences && initial_state->size(1) == channels &&
           initial_state->size(2) == modes && initial_state->scalar_type() == log_decay.scalar_type()),
      kOp, ": initial_state must be (B, H, N), with cu_seqlens one per document, of the type of log_decay");
  STD_TORCH_CHECK(
      !mask.has_value() || (mask->dim() == 2 && mask->size(0) == batch && mask->size(1) == length &&
                            mask->scalar_type() == ScalarType::Bool),
      kOp, ": key_padding_mask must be (B, L), bool");
}

int64_t whole_tiles(int64_t length) {
  return (length + kScanTile - 1) / kScanTile * kScanTile;
}

// Into how many segments, which run at the same time, sequences of that length are cut that take so many blocks: as
// many as take the least time on a GPU that runs kAtATime blocks at a time. All but the last segments are passed over
// twice, the first time in about half the time of the second; the tables of a block take about as long as one tile.
int64_t segments_for(int64_t blocks, int64_t length) {
  constexpr int64_t kAtATime = 132, kLeast = 4 * kScanTile;
  const auto time = [&](int64_t segments) {
    const auto rounds = [&](int64_t count) { return (blocks * count + kAtATime - 1) / kAtATime; };
    const int64_t steps = whole_tiles((length + segments - 1) / segments);
    return (rounds(segments - 1) + 2 * rounds(segments)) * (steps + kScanTile);
  };
  int64_t best = 1;
  for (int64_t segments = 2; segments <= std::min(length / kLeast, 2 * kAtATime); ++segments) {
    best = time(segments) < time(best) ? segments : best;
  }
  return best;
}

// The tensors of a call, as the kernels take them; what points into them lives as long.
struct ScanCall {
  Tensor log_decay, weight, tables, decays;
  OptionalTensor offsets, skip, initial;
  Scan p{};

  ScanCall(
      const Tensor& u, const Tensor& log_decay_given, const Tensor& weight_given, const OptionalTensor& skip_given,
      const OptionalTensor& initial_given, const OptionalTensor& mask, const OptionalTensor& cu_seqlens, bool reverse)
      // Parameters are small.
      : log_decay(torch::stable::contiguous(log_decay_given)), weight(torch::stable::contiguous(weight_given)) {
    STD_TORCH_CHECK(u.dim() == 3, kOp, ": expected u (B, L, H)");
    check_devices(kOp, u, {log_decay, weight, skip_given, initial_given, mask, cu_seqlens});
    static_cast<Sequences&>(p) = sequences_of(kOp, u.size(0), u.size(1), cu_seqlens, offsets);
    check_sizes(u, log_decay, weight, skip_given, initial_given, mask, p.sequences());
    p.type = type_of(kOp, u);
    p.modes = {u.size(2),
               log_decay.size(1),
               is_complex(log_decay),
               const_data_of<float>(log_decay),
               const_data_of<float>(weight),
               nullptr};
    if (skip_given.has_value()) {
      skip = torch::stable::contiguous(*skip_given);
      p.modes.skip = const_data_of<float>(*skip);
    }
    if (initial_given.has_value()) {
      initial = torch::stable::contiguous(*initial_given);
      p.initial_state = const_data_of<float>(*initial);
    }
    p.reverse = reverse;
    read(u);
    if (mask.has_value()) {
      p.ignored = static_cast<const uint8_t*>(mask->const_data_ptr());
      p.ignored_batch = mask->stride(0), p.ignored_length = mask->stride(1);
    }
  }

  // What is scanned.
  void read(const Tensor& u) {
    p.u = u.const_data_ptr(), p.u_batch = u.stride(0), p.u_length = u.stride(1), p.u_channel = u.stride(2);
  }

  void make_tables(const Tensor& like, ScanUse use, void* stream) {
    const int64_t channels = p.modes.channels, modes = p.modes.modes;
    const int64_t parts = p.type == ElementType::kBFloat16 ? 1 : 3;
    const int64_t size =
        use == ScanUse::kGradients ? scan_gradient_table_size(modes, parts) : scan_table_size(modes, parts);
    tables = torch::stable::new_empty(like, {channels, size}, ScalarType::BFloat16);
    decays = torch::stable::new_empty(like, {channels, padded_modes(modes), kScanPowers, 2}, ScalarType::Float);
    const ScanTables making{p.modes, p.type, use, data_of<uint16_t>(tables), data_of<float>(decays)};
    check_launch(kOp, longvq_cuda_scan_tables(&making, stream));
    p.tables = making.tables, p.decays = making.decays;
  }

  // Cuts sequences into segments, for blocks of so many channels. Returns their states, of `numbers` floats for each
  // mode, none if no sequence has two.
  Tensor cut(const Tensor& like, int64_t channels_of_block, int64_t numbers) {
    const int64_t blocks = p.batch * ((p.modes.channels + channels_of_block - 1) / channels_of_block);
    const int64_t segments = segments_for(blocks, p.length);
    p.segment_length = whole_tiles((p.length + segments - 1) / segments);
    const int64_t rows = p.length > p.segment_length ? p.batch : 0;
    return torch::stable::new_empty(
        like, {rows, p.modes.channels, p.segments(), p.modes.modes, numbers}, ScalarType::Float);
  }

  // Scans what `u` is into y and state.
  void scan(const Tensor& u, const Tensor& y, const Tensor& state, void* stream) {
    const Tensor segment_states = cut(u, 8, 2);
    p.segment_states = segment_states.numel() > 0 ? data_of<float>(segment_states) : nullptr;
    p.y = y.mutable_data_ptr(), p.final_state = data_of<float>(state);
    check_launch(kOp, longvq_cuda_scan(&p, stream));
  }
};

void copy_or_clear(const Tensor& to, const OptionalTensor& from) {
  Tensor target = to;
  if (from.has_value()) {
    torch::stable::copy_(target, *from);
  } else {
    torch::stable::zero_(target);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> ssm_scan(
    const Tensor& u, const Tensor& log_decay, const Tensor& weight, const OptionalTensor& skip,
    const OptionalTensor& initial_state, const OptionalTensor& mask, const OptionalTensor& cu_seqlens, bool reverse) {
  const OnDeviceOf device(kOp, u);
  ScanCall call(u, log_decay, weight, skip, initial_state, mask, cu_seqlens, reverse);
  const Scan& p = call.p;
  Tensor y = torch::stable::new_empty(u, {p.batch, p.length, p.modes.channels}, u.scalar_type());
  Tensor state =
      torch::stable::new_empty(u, {p.sequences(), p.modes.channels, p.modes.modes}, call.log_decay.scalar_type());
  if (p.batch == 0 || p.modes.channels == 0) {
    return {y, state};
  }
  if (p.length == 0) {
    copy_or_clear(state, call.initial);
    return {y, state};
  }
  call.make_tables(u, ScanUse::kScan, device.stream());
  call.scan(u, y, state, device.stream());
  return {y, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ssm_scan_backward(
    const Tensor& grad_y_given, const Tensor& grad_state, const Tensor& u, const Tensor& log_decay,
    const Tensor& weight, const OptionalTensor& skip, const OptionalTensor& initial_state, const OptionalTensor& mask,
    const OptionalTensor& cu_seqlens, bool reverse, bool need_inputs, bool need_parameters) {
  const OnDeviceOf device(kOp, u);
  const Tensor grad_y = as_type(grad_y_given, u.scalar_type());
  ScanCall call(u, log_decay, weight, skip, initial_state, mask, cu_seqlens, reverse);
  Scan& p = call.p;
  const int64_t channels = p.modes.channels, modes = p.modes.modes;
  check_devices(kOp, u, {grad_y, grad_state});
  const ScalarType family = call.log_decay.scalar_type();
  STD_TORCH_CHECK(
      grad_y.dim() == 3 && grad_y.size(0) == p.batch && grad_y.size(1) == p.length && grad_y.size(2) == channels &&
          grad_state.dim() == 3 && grad_state.size(0) == p.sequences() && grad_state.size(1) == channels &&
          grad_state.size(2) == modes && grad_state.scalar_type() == family,
      kOp, ": gradients must have the shapes and types of y and the state");
  const auto empty = [&](bool needed, std::initializer_list<int64_t> sizes, ScalarType type) {
    return torch::stable::new_empty(
        u, needed ? torch::headeronly::IntHeaderOnlyArrayRef(sizes) : torch::headeronly::IntHeaderOnlyArrayRef({0}),
        type);
  };
  Tensor du = empty(need_inputs, {p.batch, p.length, channels}, u.scalar_type());
  Tensor dinitial = empty(need_inputs && initial_state.has_value(), {p.sequences(), channels, modes}, family);
  Tensor dlog_decay = empty(need_parameters, {channels, modes}, family);
  Tensor dweight = empty(need_parameters, {channels, modes}, family);
  Tensor dskip = empty(need_parameters && skip.has_value(), {channels}, ScalarType::Float);
  const Tensor first_state = torch::stable::contiguous(grad_state);  // of the adjoint
  const bool nothing = p.batch == 0 || channels == 0 || p.length == 0;
  if (need_parameters) {
    for (const Tensor& x : {dlog_decay, dweight, dskip}) {
      copy_or_clear(x, std::nullopt);
    }
  }
  if (need_parameters && !nothing) {
    call.make_tables(u, ScanUse::kGradients, device.stream());
    const Tensor segment_states = call.cut(u, 4, 4);
    const int64_t segments = p.batch * p.segments();
    const Tensor dmodes = torch::stable::new_empty(u, {segments, channels, modes, 4}, ScalarType::Double);
    const Tensor dskips = torch::stable::new_empty(u, {segments, channels}, ScalarType::Double);
    copy_or_clear(dmodes, std::nullopt);
    copy_or_clear(dskips, std::nullopt);
    const ScanGradients g{
        p,
        grad_y.const_data_ptr(),
        grad_y.stride(0),
        grad_y.stride(1),
        grad_y.stride(2),
        const_data_of<float>(first_state),
        segment_states.numel() > 0 ? data_of<float>(segment_states) : nullptr,
        data_of<double>(dmodes),
        data_of<double>(dskips)};
    check_launch(kOp, longvq_cuda_scan_gradients(&g, device.stream()));
    const SumScanGradients sum{
        p.modes,
        segments,
        g.dmodes,
        g.dskip,
        data_of<float>(dweight),
        data_of<float>(dlog_decay),
        skip.has_value() ? data_of<float>(dskip) : nullptr};
    check_launch(kOp, longvq_cuda_sum_scan_gradients(&sum, device.stream()));
  }
  if (need_inputs) {
    // The adjoint: from the last gradient to the first, starting with that of the last state.
    const Tensor last_state = torch::stable::new_empty(u, {p.sequences(), channels, modes}, family);
    if (nothing) {
      copy_or_clear(last_state, first_state);
    } else {
      p.adjoint = true, p.reverse = !reverse;
      p.initial_state = const_data_of<float>(first_state);
      call.read(grad_y);
      call.make_tables(u, ScanUse::kAdjoint, device.stream());
      call.scan(u, du, last_state, device.stream());
    }
    if (initial_state.has_value()) {
      dinitial = last_state;
    }
  }
  return {du, dlog_decay, dweight, dskip, dinitial};
}

}  // namespace longvq::cuda
