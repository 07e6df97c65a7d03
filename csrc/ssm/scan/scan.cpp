#include "scan.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "../../common/aligned_array.h"
#include "../../common/check_tensor.h"
#include "../../common/cpu_capability.h"
#include "../../common/documents.h"
#include "../../common/parallel_items.h"
#include "../../common/tensor_dtype.h"
#include "scan_kernel.h"

namespace longvq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

LONGVQ_DEFINE_KERNEL_OF_THIS_CPU(ScanKernel, scan_kernel)

constexpr const char* kOp = "ssm_scan";

ElementType series_type(const Tensor& x) {
  const std::optional<ElementType> type = element_type(x);
  STD_TORCH_CHECK(
      type.has_value(), kOp, ": u must be float32, bfloat16 or float16 for the compiled CPU kernel, got ",
      dtype_name(x.scalar_type()));
  return *type;
}

void* data_of(const Tensor& x) {
  return const_cast<void*>(x.const_data_ptr());
}

// The modes in row `row` of a tensor (..., H, N), from channel `channel` on.
ModeMatrix modes_of(const Tensor& x, int64_t row, int64_t channel) {
  const int64_t floats = x.scalar_type() == ScalarType::ComplexFloat ? 2 : 1, dims = x.dim();
  const int64_t offset = (dims == 3 ? row * x.stride(0) : 0) + channel * x.stride(dims - 2);
  return {static_cast<float*>(data_of(x)) + offset * floats, x.stride(dims - 2) * floats, x.stride(dims - 1) * floats};
}

ModeMatrix modes_of(const OptionalTensor& x, int64_t row, int64_t channel) {
  return x.has_value() ? modes_of(*x, row, channel) : ModeMatrix{nullptr, 0, 0};
}

// The checked arguments of a call.
struct Arguments {
  const Tensor &u, &log_decay, &weight;
  const OptionalTensor &skip, &initial_state, &key_padding_mask;
  bool reverse;
  int64_t batch, length, channels, modes, longest = 0;
  bool complex_modes;
  std::vector<Document> documents;  // the rows of the kernel

  Arguments(
      const Tensor& u, const Tensor& log_decay, const Tensor& weight, const OptionalTensor& skip,
      const OptionalTensor& initial_state, const OptionalTensor& key_padding_mask, const OptionalTensor& cu_seqlens,
      bool reverse)
      : u(u), log_decay(log_decay), weight(weight), skip(skip), initial_state(initial_state),
        key_padding_mask(key_padding_mask), reverse(reverse) {
    // Python checks the same first, with better messages. Calls through torch.ops skip Python, so memory safety depends
    // on these checks.
    const ScalarType family = log_decay.scalar_type();
    complex_modes = family == ScalarType::ComplexFloat;
    STD_TORCH_CHECK(
        complex_modes || family == ScalarType::Float, kOp,
        ": log_decay must be float32 or complex64 for the compiled CPU kernel, got ", dtype_name(family));
    series_type(u);
    check_tensor(kOp, "u", u, u.scalar_type(), "(B, L, H)", {kAnySize, kAnySize, kAnySize});
    batch = u.size(0), length = u.size(1), channels = u.size(2);
    check_tensor(kOp, "log_decay", log_decay, family, "(H, N)", {channels, kAnySize});
    modes = log_decay.size(1);
    STD_TORCH_CHECK(modes >= 1, kOp, ": log_decay must have at least one mode N, got ", modes);
    documents = documents_of(kOp, batch, length, cu_seqlens);
    for (const Document& document : documents) {
      longest = std::max(longest, document.length);
    }
    check_tensor(kOp, "weight", weight, family, "(H, N)", {channels, modes});
    if (initial_state.has_value()) {
      check_state(*initial_state, "initial_state");
    }
    if (skip.has_value()) {
      check_tensor(kOp, "skip", *skip, ScalarType::Float, "(H,)", {channels});
    }
    if (key_padding_mask.has_value()) {
      check_tensor(kOp, "key_padding_mask", *key_padding_mask, ScalarType::Bool, "(B, L)", {batch, length});
    }
  }

  int64_t rows() const { return static_cast<int64_t>(documents.size()); }

  void check_state(const Tensor& x, const char* name) const {
    check_tensor(kOp, name, x, log_decay.scalar_type(), "(rows or documents, H, N)", {rows(), channels, modes});
  }

  void check_series(const Tensor& x, const char* name) const {
    check_tensor(kOp, name, x, u.scalar_type(), "(B, L, H)", {batch, length, channels});
  }

  ScanModel model(int64_t channel, int64_t line) const {
    ScanModel model{};
    model.longest = longest;
    model.channels = std::min(line, channels - channel);
    model.modes = modes;
    model.complex_modes = complex_modes;
    model.log_decay = modes_of(log_decay, 0, channel);
    model.weight = modes_of(weight, 0, channel);
    if (skip.has_value()) {
      model.skip_stride = skip->stride(0);
      model.skip = static_cast<const float*>(skip->const_data_ptr()) + channel * model.skip_stride;
    }
    return model;
  }

  // The position of the first step of document `row`, which is its last position if `from_end`.
  int64_t first_step(int64_t row, bool from_end) const {
    const Document& document = documents[row];
    return document.start + (from_end && document.length > 0 ? document.length - 1 : 0);
  }

  // Document `row` of a tensor (B, L, H), in the order of the recurrence or, if `backwards`, of its adjoint.
  Series series(const Tensor& x, int64_t row, int64_t channel, bool backwards) const {
    const ElementType type = series_type(x);
    const bool from_end = reverse != backwards;
    const int64_t offset =
        documents[row].row * x.stride(0) + first_step(row, from_end) * x.stride(1) + channel * x.stride(2);
    return {element_at(data_of(x), type, offset), from_end ? -x.stride(1) : x.stride(1), x.stride(2), type};
  }

  const bool* mask(int64_t row, bool backwards, int64_t& stride) const {
    if (!key_padding_mask.has_value() || documents[row].length == 0) {
      return nullptr;
    }
    const Tensor& x = *key_padding_mask;
    const bool from_end = reverse != backwards;
    stride = from_end ? -x.stride(1) : x.stride(1);
    return static_cast<const bool*>(x.const_data_ptr()) + documents[row].row * x.stride(0) +
           first_step(row, from_end) * x.stride(1);
  }

  ScanRow row(
      const Tensor& in, const Tensor& out, const OptionalTensor& start, const OptionalTensor& end, int64_t row,
      int64_t channel, bool backwards) const {
    ScanRow result{};
    result.length = documents[row].length;
    result.in = series(in, row, channel, backwards);
    result.out = series(out, row, channel, backwards);
    result.mask = mask(row, backwards, result.mask_stride);
    result.initial_state = modes_of(start, row, channel);
    result.final_state = modes_of(end, row, channel);
    return result;
  }
};

// The work items: lines of channels times blocks of rows, the same for any number of threads. The rows of a block share
// the tables and, in the backward, the sums.
struct Partition {
  int64_t line, lines, blocks, rows_per_block, rows;

  Partition(int64_t rows, int64_t channels, int64_t line) : line(line), rows(rows) {
    constexpr int64_t kItems = 32;  // enough work items for an even distribution
    lines = (channels + line - 1) / line;
    const int64_t wanted = std::min(rows, (kItems + lines - 1) / lines);
    rows_per_block = (rows + wanted - 1) / wanted;
    blocks = (rows + rows_per_block - 1) / rows_per_block;
  }

  // Runs call(channel, first_row, rows, block, scratch) for every work item.
  template <typename Call>
  void run(int64_t scratch_bytes, const Call& call) const {
    const auto setup = [&] { return aligned_array<char>(scratch_bytes); };
    parallel_items(lines * blocks, setup, [&](int64_t item, const AlignedArray<char>& scratch) {
      const int64_t block = item % blocks, first_row = block * rows_per_block;
      call(item / blocks * line, first_row, std::min(rows_per_block, rows - first_row), block, scratch.get());
    });
  }
};

Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

}  // namespace

std::tuple<Tensor, Tensor> ssm_scan_cpu(
    const Tensor& u, const Tensor& log_decay, const Tensor& weight, const OptionalTensor& skip,
    const OptionalTensor& initial_state, const OptionalTensor& key_padding_mask, const OptionalTensor& cu_seqlens,
    bool reverse) {
  const Arguments args(u, log_decay, weight, skip, initial_state, key_padding_mask, cu_seqlens, reverse);
  const Tensor y = new_tensor(u, {args.batch, args.length, args.channels}, u.scalar_type());
  const Tensor state = new_tensor(log_decay, {args.rows(), args.channels, args.modes}, log_decay.scalar_type());
  if (args.rows() > 0 && args.channels > 0) {
    const ScanKernel& kernel = kernel_of_this_cpu();
    const Partition work(args.rows(), args.channels, kernel.line);
    work.run(
        kernel.scratch_bytes(args.modes, args.complex_modes),
        [&](int64_t channel, int64_t first_row, int64_t count, int64_t, void* scratch) {
          std::vector<ScanRow> rows;
          for (int64_t row = first_row; row < first_row + count; ++row) {
            rows.push_back(args.row(u, y, initial_state, state, row, channel, false));
          }
          kernel.scan(args.model(channel, kernel.line), false, rows.data(), count, scratch);
        });
  }
  return {y, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ssm_scan_backward_cpu(
    const Tensor& grad_y, const Tensor& grad_state, const Tensor& u, const Tensor& log_decay, const Tensor& weight,
    const OptionalTensor& skip, const OptionalTensor& initial_state, const OptionalTensor& key_padding_mask,
    const OptionalTensor& cu_seqlens, bool reverse, bool need_inputs, bool need_parameters) {
  const Arguments args(u, log_decay, weight, skip, initial_state, key_padding_mask, cu_seqlens, reverse);
  args.check_series(grad_y, "grad_y");
  args.check_state(grad_state, "grad_state");
  const ScalarType family = log_decay.scalar_type();
  const auto new_if = [](bool wanted, const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
    return new_tensor(like, wanted ? shape : std::vector<int64_t>{0}, type);
  };
  const bool has_dskip = need_parameters && skip.has_value(), has_dinitial = need_inputs && initial_state.has_value();
  Tensor du = new_if(need_inputs, u, {args.batch, args.length, args.channels}, u.scalar_type());
  Tensor dlog = new_if(need_parameters, log_decay, {args.channels, args.modes}, family);
  Tensor dweight = new_if(need_parameters, log_decay, {args.channels, args.modes}, family);
  Tensor dskip = new_if(has_dskip, log_decay, {args.channels}, ScalarType::Float);
  Tensor dinitial = new_if(has_dinitial, log_decay, {args.rows(), args.channels, args.modes}, family);
  const OptionalTensor end = has_dinitial ? OptionalTensor(dinitial) : std::nullopt;
  if (args.rows() == 0 || args.channels == 0) {
    for (Tensor* empty : {&dlog, &dweight, &dskip}) {
      torch::stable::zero_(*empty);
    }
    return {du, dlog, dweight, dskip, dinitial};
  }

  const ScanKernel& kernel = kernel_of_this_cpu();
  const int64_t line = kernel.line, columns = (args.complex_modes ? 2 : 1) * args.modes;
  const Partition work(args.rows(), args.channels, line);
  // Sums of each block of rows: log_decay and weight (columns, line), skip (line,). They are added in a fixed order
  // below.
  const int64_t per_item = (2 * columns + 1) * line;
  const AlignedArray<double> sums = aligned_array<double>(need_parameters ? work.lines * work.blocks * per_item : 0);
  work.run(
      kernel.scratch_bytes(args.modes, args.complex_modes),
      [&](int64_t channel, int64_t first_row, int64_t count, int64_t block, void* scratch) {
        const ScanModel model = args.model(channel, line);
        std::vector<ScanRow> rows;
        for (int64_t row = first_row; need_inputs && row < first_row + count; ++row) {
          rows.push_back(args.row(grad_y, du, grad_state, end, row, channel, true));
        }
        if (need_inputs) {
          kernel.scan(model, true, rows.data(), count, scratch);
        }
        if (!need_parameters) {
          return;
        }
        std::vector<ScanGradientRow> gradient_rows;
        for (int64_t row = first_row; row < first_row + count; ++row) {
          ScanGradientRow gradient{};
          gradient.length = args.documents[row].length;
          gradient.u = args.series(u, row, channel, false);
          gradient.grad_y = args.series(grad_y, row, channel, false);
          gradient.mask = args.mask(row, false, gradient.mask_stride);
          gradient.initial_state = modes_of(initial_state, row, channel);
          gradient.grad_state = modes_of(grad_state, row, channel);
          gradient_rows.push_back(gradient);
        }
        double* item = sums.get() + (channel / line * work.blocks + block) * per_item;
        kernel.gradients(
            model, gradient_rows.data(), count, {item, item + columns * line, item + 2 * columns * line}, scratch);
      });

  if (!need_parameters) {
    return {du, dlog, dweight, dskip, dinitial};
  }
  const auto total = [&](int64_t channel, int64_t offset) {
    const double* item = sums.get() + channel / line * work.blocks * per_item + offset + channel % line;
    double value = 0.0;
    for (int64_t block = 0; block < work.blocks; ++block) {
      value += item[block * per_item];
    }
    return static_cast<float>(value);
  };
  float* log_out = static_cast<float*>(dlog.mutable_data_ptr());
  float* weight_out = static_cast<float*>(dweight.mutable_data_ptr());
  for (int64_t channel = 0; channel < args.channels; ++channel) {
    for (int64_t column = 0; column < columns; ++column) {
      log_out[channel * columns + column] = total(channel, column * line);
      weight_out[channel * columns + column] = total(channel, (columns + column) * line);
    }
    if (has_dskip) {
      static_cast<float*>(dskip.mutable_data_ptr())[channel] = total(channel, 2 * columns * line);
    }
  }
  return {du, dlog, dweight, dskip, dinitial};
}

}  // namespace longvq
