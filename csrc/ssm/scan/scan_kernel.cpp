// Compiled once per instruction set, with LONGVQ_ISA set to its name; see simd.h for what it may include.
//
// The diagonal recurrence by chunks (chunk_tables.h). Sixteen (AVX-512), eight or four channels lie across the lanes,
// so each product is a small matrix product whose elements are registers, with a matrix of its own in every lane. What
// a segment of chunks needs stays in the cache; from chunk to chunk only the state is carried, in double precision, so
// that neither length nor slow decay costs accuracy. Nothing depends on threads or on what was computed before.
#include "scan_kernel.h"

#include "chunk_products.h"
#include "gradients.h"

namespace longvq {
namespace {

// Runs the state over `whole` chunks: states[c] holds what chunk c adds and then the state that it meets. One more,
// unfinished chunk, if any, only meets it.
template <bool COMPLEX>
void carry(const ChunkTables& tables, Doubles* state, Floats* states, int64_t whole, bool unfinished) {
  for (int64_t n = 0; n < tables.modes; ++n) {
    Complex lambda[2], x[2];
    for (int h = 0; h < 2; ++h) {
      lambda[h] = tables.get(tables.whole, n, h);
      x[h] = tables.get(state, n, h);
    }
    Floats* entry = states + (COMPLEX ? 2 * n : n);
    for (int64_t c = 0; c < whole; ++c, entry += tables.padded_columns) {
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

// Of one register of channels.
struct ScanGroup {
  ChunkTables tables;
  Floats* states;  // (kSegment, padded_columns)
  Floats* added;   // (padded_columns,) by the unfinished chunk
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

// Inputs of a segment to its outputs, and the state over its whole chunks.
void scan_segment(ScanGroup& group, Floats* inputs, int64_t steps, Floats* results) {
  const ChunkTables& tables = group.tables;
  const int64_t columns = tables.padded_columns;
  const int64_t whole = steps / kChunk, unfinished = steps % kChunk, chunks = whole + (unfinished != 0);
  for (int64_t t = steps; t < chunks * kChunk; ++t) {
    inputs[t] = Floats{};
  }
  for_tiles(whole, [&](auto rows, int64_t c) {
    for (int64_t column = 0; column < columns; column += kPanel) {
      into_state<rows.value>(tables, inputs + c * kChunk, column, group.states + c * columns);
    }
  });
  if (unfinished) {
    Floats aligned[kChunk];
    align_to_end(inputs + whole * kChunk, unfinished, aligned);
    for (int64_t column = 0; column < columns; column += kPanel) {
      into_state<1>(tables, aligned, column, group.added);
    }
  }
  (tables.complex_modes ? carry<true> : carry<false>)(tables, group.state, group.states, whole, unfinished != 0);
  for_tiles(chunks, [&](auto rows, int64_t c) {
    for (int t0 = 0; t0 < kChunk && t0 < steps; t0 += kPanel) {
      outputs<rows.value>(tables, group.states + c * columns, inputs + c * kChunk, t0, results + c * kChunk);
    }
  });
}

// A gradient is the conjugate of what the adjoint runs on.
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

void finish(ScanGroup& group, const ModeMatrix& final_state, int64_t channels, int64_t rest, bool adjoint) {
  ChunkTables& tables = group.tables;
  tables.set_rest(rest);
  for (int64_t n = 0; n < tables.modes; ++n) {
    const int64_t column = tables.complex_modes ? 2 * n : n;
    for (int h = 0; h < 2; ++h) {
      Complex x = tables.get(group.state, n, h);
      if (rest) {
        x = plus_product<true>(
            read_column(group.added + column, tables.complex_modes, h), tables.get(tables.rest, n, h), x);
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
    scratch.groups[g].tables.fill(part_of(model, g), adjoint);
  }
  for (const ScanRow* row = rows; row < rows + count; ++row) {
    for (int g = 0; g < groups; ++g) {
      start(scratch.groups[g], part_of(row->initial_state, g), channels_of(model.channels, g), adjoint);
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
            scratch.groups[g], part_of(row->final_state, g), channels_of(model.channels, g), row->length % kChunk,
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
