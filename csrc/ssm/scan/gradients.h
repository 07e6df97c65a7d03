// Gradients of log_decay, weight and skip. For scan_kernel.cpp only.
//
// Let x_t be the states and z_t = lambda (z_{t-1} + x_{t-1}) their derivatives by log_decay. Then
//     dL/dw = sum_t g_t x_t,    dL/dlog_decay = w sum_t g_t z_t.
// Both are computed by chunks. The contribution through K needs c_l, the sums of products of g and u inside chunks at
// distance l. The contribution of the entry states X and Z of a chunk needs Q = sum_t lambda^(t+1) g_t and
// Q' = sum_t (t+1) lambda^(t+1) g_t:
//     dL/dw: sum_l lambda^l c_l + sum_c Q X,    dL/dlog_decay: w (sum_l l lambda^l c_l + sum_c (Q Z + Q' X)).
// The next Z is lambda^T (Z + T X) + sum_t (T-1-t) lambda^(T-1-t) u_t. All four sums over a chunk use the table `into`,
// because lambda^(t+1) is lambda times this table in reverse order. The code passes over the sequence once and stores
// no states.
#pragma once

#include "../../common/simd.h"
#include "chunk_products.h"

namespace longvq {
namespace {

// The rows of one product with the table `into`. kG is g in reverse order. The weighted rows are (T-1-t) u_t and, in
// the reverse order of kG, (t+1) g_t.
enum Role { kU, kWeightedU, kG, kWeightedG, kRoles };

// Tables and sums for one register of channels.
struct GradientGroup {
  ChunkTables tables;
  Doubles *x, *z;        // states
  Doubles *by_x, *by_z;  // sum Q X and sum Q Z + Q' X
  Doubles* by_end;       // sums through the last state
  Doubles* by_lag;       // (kChunk, halves) c_l

  void allocate(int64_t modes, bool complex_modes, Arena& arena) {
    tables.allocate(modes, complex_modes, arena);
    x = arena.take<Doubles>(4 * modes);
    z = arena.take<Doubles>(4 * modes);
    by_x = arena.take<Doubles>(4 * modes);
    by_z = arena.take<Doubles>(4 * modes);
    by_end = arena.take<Doubles>(4 * modes);
    by_lag = arena.take<Doubles>(2 * kChunk);
  }

  void clear() {
    for (int64_t i = 0; i < 4 * tables.modes; ++i) {
      by_x[i] = by_z[i] = by_end[i] = Doubles{};
    }
    for (int64_t i = 0; i < 2 * kChunk; ++i) {
      by_lag[i] = Doubles{};
    }
  }
};

struct GradientScratch {
  GradientGroup groups[kGroups];
  Floats *u, *g;   // (kGroups, kSegmentSteps)
  Floats* inputs;  // (kSegment, kRoles, kChunk)
  Floats* sums;    // (kSegment, kRoles, kPanel), for one panel

  GradientScratch(int64_t modes, bool complex_modes, Arena& arena) {
    u = arena.take<Floats>(kGroups * kSegmentSteps);
    g = arena.take<Floats>(kGroups * kSegmentSteps);
    inputs = arena.take<Floats>(kSegment * kRoles * kChunk);
    sums = arena.take<Floats>(kSegment * kRoles * kPanel);
    for (GradientGroup& group : groups) {
      group.allocate(modes, complex_modes, arena);
    }
  }
};

inline void arrange(const Floats* u, const Floats* g, Floats* inputs) {
  for (int t = 0; t < kChunk; ++t) {
    inputs[kU * kChunk + t] = u[t];
    inputs[kWeightedU * kChunk + t] = u[t] * static_cast<float>(kChunk - 1 - t);
    inputs[kG * kChunk + t] = g[kChunk - 1 - t];
    inputs[kWeightedG * kChunk + t] = g[kChunk - 1 - t] * static_cast<float>(kChunk - t);
  }
}

// c_l += sum over chunks and t of g_t u_{t-l}.
void add_lags(const Floats* u, const Floats* g, int64_t chunks, Doubles* by_lag) {
  constexpr int kTile = 4;
  for (int t0 = 0; t0 < kChunk; t0 += kTile) {
    for (int s0 = 0; s0 < t0 + kTile; s0 += kPanel) {
      Floats acc[kTile][kPanel] = {};
      for (int64_t c = 0; c < chunks; ++c) {
        const Floats* gs = g + c * kChunk + t0;
        const Floats* us = u + c * kChunk + s0;
        for (int i = 0; i < kTile; ++i) {
          for (int j = 0; j < kPanel; ++j) {
            acc[i][j] += gs[i] * us[j];
          }
        }
      }
      for (int i = 0; i < kTile; ++i) {
        for (int j = 0; j < kPanel; ++j) {
          const int lag = t0 + i - s0 - j;
          for (int h = 0; lag >= 0 && h < 2; ++h) {
            by_lag[2 * lag + h] += widened(&acc[i][j], h);
          }
        }
      }
    }
  }
}

// One mode, over the chunks of a segment. `sums` starts at the mode's column of the panel.
template <bool COMPLEX>
void carry_and_add(GradientGroup& group, const Floats* sums, int64_t n, int64_t full, bool unfinished) {
  const ChunkTables& tables = group.tables;
  for (int h = 0; h < 2; ++h) {
    const Complex lambda = tables.get(tables.chunk_decay, n, h);
    Complex x = tables.get(group.x, n, h), z = tables.get(group.z, n, h);
    Complex by_x = tables.get(group.by_x, n, h), by_z = tables.get(group.by_z, n, h);
    const Floats* entry = sums;
    for (int64_t c = 0; c < full + unfinished; ++c, entry += kRoles * kPanel) {
      const Complex q = read_column(entry + kG * kPanel, COMPLEX, h);
      by_x = plus_product<COMPLEX>(by_x, q, x);
      by_z = plus_product<COMPLEX>(by_z, q, z);
      by_z = plus_product<COMPLEX>(by_z, read_column(entry + kWeightedG * kPanel, COMPLEX, h), x);
      if (c < full) {
        const Complex shifted = plus_scaled<COMPLEX>(z, x, kChunk);
        z = plus_product<COMPLEX>(read_column(entry + kWeightedU * kPanel, COMPLEX, h), lambda, shifted);
        x = plus_product<COMPLEX>(read_column(entry + kU * kPanel, COMPLEX, h), lambda, x);
      }
    }
    tables.set(group.x, n, h, x);
    tables.set(group.z, n, h, z);
    tables.set(group.by_x, n, h, by_x);
    tables.set(group.by_z, n, h, by_z);
  }
}

template <bool COMPLEX>
void add_segment(GradientGroup& group, Floats* u, Floats* g, int64_t steps, Floats* inputs, Floats* sums) {
  const ChunkTables& tables = group.tables;
  constexpr int kColumns = COMPLEX ? 2 : 1;  // columns of a mode
  const int64_t full = steps / kChunk, unfinished = steps % kChunk, chunks = full + (unfinished != 0);
  for (int64_t t = steps; t < chunks * kChunk; ++t) {
    u[t] = g[t] = Floats{};
  }
  for (int64_t c = 0; c < chunks; ++c) {
    arrange(u + c * kChunk, g + c * kChunk, inputs + c * kRoles * kChunk);
  }
  add_lags(u, g, chunks, group.by_lag);
  for (int64_t column = 0; column < tables.columns; column += kPanel) {
    for (int64_t c = 0; c < chunks; ++c) {
      Floats acc[kRoles][kPanel] = {};
      multiply<kRoles>(acc, inputs + c * kRoles * kChunk, kChunk, tables.into + column * kChunk, kPanel, kChunk);
      store_rows<kRoles>(acc, sums + c * kRoles * kPanel, kPanel);
    }
    for (int j = 0; j < kPanel && column + j < tables.columns; j += kColumns) {
      carry_and_add<COMPLEX>(group, sums + j, (column + j) / kColumns, full, unfinished != 0);
    }
  }
}

// Adds dL/dlog_decay through the last state. The inputs of the unfinished chunk of `tail_steps` steps begin at `tail`
// and are aligned to the end of a chunk. The chunk changes z by lambda^tail_steps.
template <bool COMPLEX>
void add_end(
    GradientGroup& group, const ModeMatrix& grad_state, int64_t channels, const Floats* tail, int64_t tail_steps) {
  ChunkTables& tables = group.tables;
  constexpr int kColumns = COMPLEX ? 2 : 1;
  Floats weighted[kChunk];
  align_to_end(tail, tail_steps, weighted);
  for (int t = 0; t < kChunk; ++t) {
    weighted[t] *= static_cast<float>(kChunk - 1 - t);
  }
  tables.set_tail(tail_steps);
  for (int64_t column = 0; column < tables.columns; column += kPanel) {
    Floats added[1][kPanel] = {};
    if (tail_steps) {
      multiply<1>(added, weighted, kChunk, tables.into + column * kChunk, kPanel, kChunk);
    }
    for (int j = 0; j < kPanel && column + j < tables.columns; j += kColumns) {
      const int64_t n = (column + j) / kColumns;
      for (int h = 0; h < 2; ++h) {
        const Complex x = tables.get(group.x, n, h), z = tables.get(group.z, n, h);
        const Complex shifted = plus_scaled<COMPLEX>(z, x, static_cast<double>(tail_steps));
        const Complex end =
            plus_product<COMPLEX>(read_column(&added[0][j], COMPLEX, h), tables.get(tables.tail_decay, n, h), shifted);
        Complex grad = read_mode(grad_state, channels, n, COMPLEX, h);
        grad.im = -grad.im;
        tables.set(group.by_end, n, h, plus_product<COMPLEX>(tables.get(group.by_end, n, h), grad, end));
      }
    }
  }
}

template <bool COMPLEX>
void add_row(const ScanModel& model, const ScanGradientRow& row, GradientScratch& scratch, int groups) {
  for (int g = 0; g < groups; ++g) {
    GradientGroup& group = scratch.groups[g];
    const ModeMatrix initial_state = group_of(row.initial_state, g);
    for (int64_t n = 0; n < model.modes; ++n) {
      for (int h = 0; h < 2; ++h) {
        group.tables.set(group.x, n, h, read_mode(initial_state, channels_of(model.channels, g), n, COMPLEX, h));
        group.tables.set(group.z, n, h, Complex{});
      }
    }
  }
  const Mask mask{row.mask, row.mask_stride};
  for (int64_t first = 0; first < row.length; first += kSegmentSteps) {
    const int64_t steps = row.length - first < kSegmentSteps ? row.length - first : kSegmentSteps;
    read_steps(row.u, model.channels, mask, first, steps, scratch.u, kSegmentSteps);
    read_steps(row.grad_y, model.channels, mask, first, steps, scratch.g, kSegmentSteps);
    for (int g = 0; g < groups; ++g) {
      add_segment<COMPLEX>(
          scratch.groups[g], scratch.u + g * kSegmentSteps, scratch.g + g * kSegmentSteps, steps, scratch.inputs,
          scratch.sums);
    }
  }
  if (row.grad_state.data != nullptr) {
    const int64_t tail_steps = row.length % kChunk;
    const int64_t tail = (row.length - tail_steps) % kSegmentSteps;  // index of the unfinished chunk's inputs
    for (int g = 0; g < groups; ++g) {
      add_end<COMPLEX>(
          scratch.groups[g], group_of(row.grad_state, g), channels_of(model.channels, g),
          scratch.u + g * kSegmentSteps + tail, tail_steps);
    }
  }
}

// Writes the sums of one register of channels.
void finish(GradientGroup& group, const ScanModel& model, const ScanGradients& sums, int first_channel) {
  const ChunkTables& tables = group.tables;
  const auto write = [&](double* out, int64_t mode, int h, const Complex& value) {
    const int64_t column = tables.complex_modes ? 2 * mode : mode;
    store(out + column * kLine + first_channel + h * kHalf, value.re);
    if (tables.complex_modes) {
      store(out + (column + 1) * kLine + first_channel + h * kHalf, -value.im);  // PyTorch's gradient is the conjugate
    }
  };
  for (int64_t n = 0; n < model.modes; ++n) {
    for (int h = 0; h < 2; ++h) {
      const Complex lambda = tables.get(tables.decay, n, h);
      Complex by_weight = product<true>(lambda, tables.get(group.by_x, n, h));
      Complex by_decay = product<true>(lambda, tables.get(group.by_z, n, h));
      Complex power{broadcast(1.0), Doubles{}};
      for (int lag = 0; lag < kChunk; ++lag) {
        const Doubles products = group.by_lag[2 * lag + h];
        const Complex term{power.re * products, power.im * products};
        by_weight = plus_scaled<true>(by_weight, term, 1.0);
        by_decay = plus_scaled<true>(by_decay, term, lag);
        power = product<true>(power, lambda);
      }
      const Complex weight = read_mode(model.weight, model.channels, n, model.complex_modes, h);
      write(sums.weight, n, h, by_weight);
      write(sums.log_decay, n, h, plus_product<true>(tables.get(group.by_end, n, h), weight, by_decay));
    }
  }
  for (int h = 0; h < 2; ++h) {
    store(sums.skip + first_channel + h * kHalf, group.by_lag[h]);
  }
}

void gradients(
    const ScanModel& model, const ScanGradientRow* rows, int64_t count, const ScanGradients& sums, void* memory) {
  const FlushToZero flush;
  Arena arena{reinterpret_cast<uintptr_t>(memory)};
  GradientScratch scratch(model.modes, model.complex_modes, arena);
  const int groups = static_cast<int>(round_up(model.channels, kLanes) / kLanes);
  for (int g = 0; g < groups; ++g) {
    scratch.groups[g].tables.fill(group_of(model, g), false);
    scratch.groups[g].clear();
  }
  for (int64_t i = 0; i < count; ++i) {
    (model.complex_modes ? add_row<true> : add_row<false>)(model, rows[i], scratch, groups);
  }
  for (int g = 0; g < groups; ++g) {
    finish(scratch.groups[g], group_of(model, g), sums, g * kLanes);
  }
}

}  // namespace
}  // namespace longvq
