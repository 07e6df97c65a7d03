#include <algorithm>

#include "../common/status.h"
#include "../operators.h"
#include "params.h"

namespace longvq::cuda {
namespace {

constexpr const char* kOp = "ssm_scan";

bool is_complex(const Tensor& x) {
  return x.scalar_type() == ScalarType::ComplexFloat;
}

void check_inputs(
    const Tensor& u, const Tensor& log_decay, const Tensor& weight, const OptionalTensor& skip,
    const OptionalTensor& initial_state, const OptionalTensor& mask, int64_t sequences) {
  const int64_t channels = u.size(2);
  const ScalarType type = log_decay.scalar_type();
  check(
      kOp, "log_decay", log_decay,
      has_sizes(log_decay, {channels, kAnySize}) && log_decay.size(1) >= 1 &&
          (type == ScalarType::Float || is_complex(log_decay)),
      "(H, N) float32 or complex64, with the H of u and N >= 1");
  const int64_t modes = log_decay.size(1);
  check(
      kOp, "weight", weight, has_sizes(weight, {channels, modes}) && weight.scalar_type() == type,
      "(H, N) in the dtype of log_decay");
  if (skip.has_value()) {
    check(kOp, "skip", *skip, has_sizes(*skip, {channels}) && skip->scalar_type() == ScalarType::Float, "(H,) float32");
  }
  if (initial_state.has_value()) {
    check(
        kOp, "initial_state", *initial_state,
        has_sizes(*initial_state, {sequences, channels, modes}) && initial_state->scalar_type() == type,
        "(B, H, N), or (documents, H, N) with cu_seqlens, in the dtype of log_decay");
  }
  check_mask(kOp, mask, u.size(0), u.size(1));
}

int64_t whole_tiles(int64_t length) {
  return (length + kScanTile - 1) / kScanTile * kScanTile;
}

// The number of segments for sequences of this length, where one segment of all sequences takes `blocks` blocks of
// threads. It is the number with the least estimated time on a GPU that runs kAtATime blocks at a time. Two passes go
// over every segment except the last one, which only the second pass visits. The first pass takes about half the time
// of the second. Loading the tables of a block takes about as long as one tile.
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

// One call of the operator, checked and turned into what the launchers take. `p` points into the tensors of this struct
// and into the tensors that the constructor got.
struct ScanCall {
  Tensor log_decay, weight, tables, decays;
  OptionalTensor offsets, skip, initial;
  Scan p{};

  ScanCall(
      const Tensor& u, const Tensor& log_decay_given, const Tensor& weight_given, const OptionalTensor& skip_given,
      const OptionalTensor& initial_given, const OptionalTensor& mask, const OptionalTensor& cu_seqlens, bool reverse)
      : log_decay(torch::stable::contiguous(log_decay_given)), weight(torch::stable::contiguous(weight_given)) {
    check(kOp, "u", u, u.dim() == 3, "(B, L, H)");
    check_same_device(kOp, u, {log_decay, weight, skip_given, initial_given, mask, cu_seqlens});
    static_cast<Sequences&>(p) = sequences_of(kOp, u.size(0), u.size(1), cu_seqlens, offsets);
    check_inputs(u, log_decay, weight, skip_given, initial_given, mask, p.num_sequences());
    p.type = checked_type(kOp, "u", u);
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
    set_input(u);
    p.mask = padding_mask(mask);
  }

  // The tensor that is scanned: u, or in the adjoint the gradient of y.
  void set_input(const Tensor& u) { p.u = u.const_data_ptr(), p.u_strides = strides_of<ScanStrides>(u); }

  void make_tables(const Tensor& like, ScanUse use, void* stream) {
    const int64_t channels = p.modes.channels, modes = p.modes.modes;
    const int64_t terms = p.type == ElementType::kBFloat16 ? 1 : 3;
    const int64_t size =
        use == ScanUse::kGradients ? scan_gradient_table_size(modes, terms) : scan_table_size(modes, terms);
    tables = torch::stable::new_empty(like, {channels, size}, ScalarType::BFloat16);
    decays = torch::stable::new_empty(like, {channels, padded_modes(modes), kScanPowers, 2}, ScalarType::Float);
    const ScanTables making{p.modes, p.type, use, data_of<uint16_t>(tables), data_of<float>(decays)};
    check_launch(kOp, longvq_cuda_scan_tables(&making, stream));
    p.tables = making.tables, p.decays = making.decays;
  }

  // Sets the length of segments, for blocks of `channels_of_block` channels. Callers pass the channels of bfloat16
  // blocks. Blocks of other dtypes have 2 channels, so the estimate counts too few of them. Returns memory for the
  // states of all segments, `floats_of_mode` floats for each mode; empty if no sequence has two segments.
  Tensor cut_into_segments(const Tensor& like, int64_t channels_of_block, int64_t floats_of_mode) {
    const int64_t blocks = p.batch * ((p.modes.channels + channels_of_block - 1) / channels_of_block);
    const int64_t segments = segments_for(blocks, p.length);
    p.segment_length = whole_tiles((p.length + segments - 1) / segments);
    const int64_t rows = p.length > p.segment_length ? p.batch : 0;
    return torch::stable::new_empty(
        like, {rows, p.modes.channels, p.num_segments(), p.modes.modes, floats_of_mode}, ScalarType::Float);
  }

  // Scans the input into y and state.
  void scan(const Tensor& y, const Tensor& state, void* stream) {
    const Tensor segment_states = cut_into_segments(y, 8, 2);
    p.segment_states = segment_states.numel() > 0 ? data_of<float>(segment_states) : nullptr;
    p.y = y.mutable_data_ptr(), p.final_state = data_of<float>(state);
    check_launch(kOp, longvq_cuda_scan(&p, stream));
  }
};

}  // namespace

std::tuple<Tensor, Tensor> ssm_scan(
    const Tensor& u, const Tensor& log_decay, const Tensor& weight, const OptionalTensor& skip,
    const OptionalTensor& initial_state, const OptionalTensor& mask, const OptionalTensor& cu_seqlens, bool reverse) {
  const OnDeviceOf device(kOp, u);
  ScanCall call(u, log_decay, weight, skip, initial_state, mask, cu_seqlens, reverse);
  const Scan& p = call.p;
  Tensor y = torch::stable::new_empty(u, {p.batch, p.length, p.modes.channels}, u.scalar_type());
  Tensor state =
      torch::stable::new_empty(u, {p.num_sequences(), p.modes.channels, p.modes.modes}, call.log_decay.scalar_type());
  if (p.batch == 0 || p.modes.channels == 0) {
    return {y, state};
  }
  if (p.length == 0) {
    if (call.initial.has_value()) {
      torch::stable::copy_(state, *call.initial);
    } else {
      torch::stable::zero_(state);
    }
    return {y, state};
  }
  call.make_tables(u, ScanUse::kScan, device.stream());
  call.scan(y, state, device.stream());
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
  check_same_device(kOp, u, {grad_y, grad_state});
  const ScalarType mode_type = call.log_decay.scalar_type();
  check(kOp, "grad_y", grad_y, has_sizes(grad_y, {p.batch, p.length, channels}), "(B, L, H), the gradient of y");
  check(
      kOp, "grad_state", grad_state,
      has_sizes(grad_state, {p.num_sequences(), channels, modes}) && grad_state.scalar_type() == mode_type,
      "(B, H, N), or (documents, H, N) with cu_seqlens, in the dtype of log_decay");
  const auto empty = [&](bool needed, std::initializer_list<int64_t> sizes, ScalarType type) {
    return torch::stable::new_empty(
        u, needed ? torch::headeronly::IntHeaderOnlyArrayRef(sizes) : torch::headeronly::IntHeaderOnlyArrayRef({0}),
        type);
  };
  Tensor du = empty(need_inputs, {p.batch, p.length, channels}, u.scalar_type());
  Tensor dinitial = empty(need_inputs && initial_state.has_value(), {p.num_sequences(), channels, modes}, mode_type);
  Tensor dlog_decay = empty(need_parameters, {channels, modes}, mode_type);
  Tensor dweight = empty(need_parameters, {channels, modes}, mode_type);
  Tensor dskip = empty(need_parameters && skip.has_value(), {channels}, ScalarType::Float);
  const Tensor first_state = torch::stable::contiguous(grad_state);  // the adjoint starts with it
  const bool is_empty = p.batch == 0 || channels == 0 || p.length == 0;
  if (need_parameters) {
    for (Tensor* x : {&dlog_decay, &dweight, &dskip}) {
      torch::stable::zero_(*x);
    }
  }
  if (need_parameters && !is_empty) {
    call.make_tables(u, ScanUse::kGradients, device.stream());
    const Tensor segment_states = call.cut_into_segments(u, 4, 4);
    const int64_t segments = p.batch * p.num_segments();
    const Tensor dmodes = new_zeros(u, {segments, channels, modes, 4}, ScalarType::Double);
    const Tensor dskips = new_zeros(u, {segments, channels}, ScalarType::Double);
    const ScanGradients g{
        p,
        grad_y.const_data_ptr(),
        strides_of<ScanStrides>(grad_y),
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
    // The adjoint starts with the gradient of the final state and ends with the gradient of the initial state.
    Tensor last_state = torch::stable::new_empty(u, {p.num_sequences(), channels, modes}, mode_type);
    if (is_empty) {
      torch::stable::copy_(last_state, first_state);
    } else {
      p.adjoint = true, p.reverse = !reverse;
      p.initial_state = const_data_of<float>(first_state);
      call.set_input(grad_y);
      call.make_tables(u, ScanUse::kAdjoint, device.stream());
      call.scan(du, last_state, device.stream());
    }
    if (initial_state.has_value()) {
      dinitial = last_state;
    }
  }
  return {du, dlog_decay, dweight, dskip, dinitial};
}

}  // namespace longvq::cuda
