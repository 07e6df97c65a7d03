// Compiled once per instruction set, with LONGVQ_ISA set to its name; common/simd.h says what such a file may include.
//
// The diagonal recurrence by chunks (chunk_tables.h). Lanes hold channels: sixteen with AVX-512, else eight or four. So
// each product is a small matrix product whose elements are registers, and every lane has its own matrix. The data of a
// segment of chunks stay in the cache. Only the state goes from chunk to chunk, in double precision, so that neither
// length nor slow decay costs accuracy. Results depend neither on threads nor on earlier calls.
#include "scan_kernel.h"

#include "chunk_products.h"
#include "gradients.h"

namespace longvq {
namespace {

// Runs the recurrence of the state over `full` chunks: states[c] is what chunk c adds, and becomes its entry state. An
// unfinished chunk after them only gets its entry state.
template <bool COMPLEX>
void carry(const ChunkTables& tables, Doubles* state, Floats* states, int64_t full, bool unfinished) {
  for (int64_t n = 0; n < tables.modes; ++n) {
    Complex lambda[2], x[2];
    for (int h = 0; h < 2; ++h) {
      lambda[h] = tables.get(tables.chunk_decay, n, h);
      x[h] = tables.get(state, n, h);
    }
    Floats* entry = states + (COMPLEX ? 2 * n : n);
    for (int64_t c = 0; c < full; ++c, entry += tables.padded_columns) {
      for (int h = 0; h < 2; ++h) {
        const Complex added = read_column(entry, COMPLEX, h);
        write_column(entry, COMPLEX, h, x[h]);
        x[h] = plus_product<COMPLEX>(added, lambda[h], x[h]);
      }
    }
    for (int h = 0; h < 2; ++h) {
      if (unfinished) {
        write_column(entry, COMPLEX, h, x[h]);
      }
      tables.set(state, n, h, x[h]);
    }
  }
}

// Tables and states for one register of channels.
struct ScanGroup {
  ChunkTables tables;
  Floats* states;  // (kSegment, padded_columns)
  Floats* added;   // (padded_columns,) what the unfinished chunk adds
  Doubles* state;

  void allocate(int64_t modes, bool complex_modes, Arena& arena) {
    tables.allocate(modes, complex_modes, arena);
    states = arena.take<Floats>(kSegment * tables.padded_columns);
    added = arena.take<Floats>(tables.padded_columns);
    state = arena.take<Doubles>(4 * modes);
  }
};

struct ScanScratch {
  ScanGroup groups[kGroups];
  Floats *inputs, *results;  // (kGroups, kSegmentSteps)

  ScanScratch(int64_t modes, bool complex_modes, Arena& arena) {
    inputs = arena.take<Floats>(kGroups * kSegmentSteps);
    results = arena.take<Floats>(kGroups * kSegmentSteps);
    for (ScanGroup& group : groups) {
      group.allocate(modes, complex_modes, arena);
    }
  }
};

// Computes the outputs of a segment, and the state after its full chunks.
void scan_segment(ScanGroup& group, Floats* inputs, int64_t steps, Floats* results) {
  const ChunkTables& tables = group.tables;
  const int64_t columns = tables.padded_columns;
  const int64_t full = steps / kChunk, unfinished = steps % kChunk, chunks = full + (unfinished != 0);
  for (int64_t t = steps; t < chunks * kChunk; ++t) {
    inputs[t] = Floats{};
  }
  for_tiles(full, [&](auto rows, int64_t c) {
    for (int64_t column = 0; column < columns; column += kPanel) {
      into_state<rows.value>(tables, inputs + c * kChunk, column, group.states + c * columns);
    }
  });
  if (unfinished) {
    Floats aligned[kChunk];
    align_to_end(inputs + full * kChunk, unfinished, aligned);
    for (int64_t column = 0; column < columns; column += kPanel) {
      into_state<1>(tables, aligned, column, group.added);
    }
  }
  (tables.complex_modes ? carry<true> : carry<false>)(tables, group.state, group.states, full, unfinished != 0);
  for_tiles(chunks, [&](auto rows, int64_t c) {
    for (int t0 = 0; t0 < kChunk && t0 < steps; t0 += kPanel) {
      outputs<rows.value>(tables, group.states + c * columns, inputs + c * kChunk, t0, results + c * kChunk);
    }
  });
}

// Sets the entry state of a row. The adjoint computes with derivatives; PyTorch's gradients are the conjugates of
// derivatives.
void start(ScanGroup& group, const ModeMatrix& initial_state, int64_t channels, bool adjoint) {
  const ChunkTables& tables = group.tables;
  for (int64_t n = 0; n < tables.modes; ++n) {
    for (int h = 0; h < 2; ++h) {
      Complex x = read_mode(initial_state, channels, n, tables.complex_modes, h);
      x.im *= adjoint ? -1.0 : 1.0;
      tables.set(group.state, n, h, x);
    }
  }
}

// Stores the state after the last chunk, which may be unfinished.
void finish(ScanGroup& group, const ModeMatrix& final_state, int64_t channels, int64_t tail_steps, bool adjoint) {
  ChunkTables& tables = group.tables;
  tables.set_tail(tail_steps);
  for (int64_t n = 0; n < tables.modes; ++n) {
    const int64_t column = tables.complex_modes ? 2 * n : n;
    for (int h = 0; h < 2; ++h) {
      Complex x = tables.get(group.state, n, h);
      if (tail_steps) {
        x = plus_product<true>(
            read_column(group.added + column, tables.complex_modes, h), tables.get(tables.tail_decay, n, h), x);
      }
      x.im *= adjoint ? -1.0 : 1.0;
      write_mode(final_state, channels, n, tables.complex_modes, h, x);
    }
  }
}

void scan(const ScanModel& model, bool adjoint, const ScanRow* rows, int64_t count, void* memory) {
  const FlushToZero flush;
  Arena arena{reinterpret_cast<uintptr_t>(memory)};
  ScanScratch scratch(model.modes, model.complex_modes, arena);
  const int groups = static_cast<int>(round_up(model.channels, kLanes) / kLanes);
  for (int g = 0; g < groups; ++g) {
    scratch.groups[g].tables.fill(group_of(model, g), adjoint);
  }
  for (const ScanRow* row = rows; row < rows + count; ++row) {
    for (int g = 0; g < groups; ++g) {
      start(scratch.groups[g], group_of(row->initial_state, g), channels_of(model.channels, g), adjoint);
    }
    const Mask mask{row->mask, row->mask_stride};
    for (int64_t first = 0; first < row->length; first += kSegmentSteps) {
      const int64_t steps = row->length - first < kSegmentSteps ? row->length - first : kSegmentSteps;
      read_steps(row->in, model.channels, mask, first, steps, scratch.inputs, kSegmentSteps);
      for (int g = 0; g < groups; ++g) {
        scan_segment(scratch.groups[g], scratch.inputs + g * kSegmentSteps, steps, scratch.results + g * kSegmentSteps);
      }
      write_steps(row->out, model.channels, mask, first, steps, scratch.results, kSegmentSteps);
    }
    if (row->final_state.data != nullptr) {
      for (int g = 0; g < groups; ++g) {
        finish(
            scratch.groups[g], group_of(row->final_state, g), channels_of(model.channels, g), row->length % kChunk,
            adjoint);
      }
    }
  }
}

int64_t scratch_bytes(int64_t modes, bool complex_modes) {
  Arena scan_arena{0}, gradient_arena{0};
  ScanScratch(modes, complex_modes, scan_arena);
  GradientScratch(modes, complex_modes, gradient_arena);
  return static_cast<int64_t>(scan_arena.next > gradient_arena.next ? scan_arena.next : gradient_arena.next);
}

}  // namespace

extern const ScanKernel LONGVQ_JOIN(scan_kernel_, LONGVQ_ISA) = {kLine, &scratch_bytes, &scan, &gradients};

}  // namespace longvq
