// The far field: sums over the keys that a block of queries attends to only through their codes.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "call.h"

namespace longvq {

// The memory layout of the sums: panels for the forward kernel, or plain rows, from which the backward packs other
// panels.
enum class SumLayout { kPanels, kRows };

// For each code the number of its far keys and the sum of their values.
struct FarField {
  Panels sums;  // (far_columns, value_columns)
  AlignedArray<float> counts, offsets;
  std::vector<float> buffer;
  int64_t keys = 0;

  FarField(const AttentionCall& call, SumLayout layout)
      : sums(
            call.far_columns, call.value_columns,
            layout == SumLayout::kPanels ? call.kernel.panel : call.value_columns),
        counts(aligned_array<float>(call.far_columns)), offsets(aligned_array<float>(call.far_columns)),
        buffer(call.value_dim) {
    clear(call);
  }

  void clear(const AttentionCall& call) {
    sums.clear();
    std::fill_n(counts.get(), call.far_columns, 0.0f);
    // With softmax a code without far keys must not become the largest score.
    std::fill_n(offsets.get(), call.far_columns, call.activation == Activation::kSoftmax ? -kInfinity : 0.0f);
    keys = 0;
  }

  void copy(const AttentionCall& call, const FarField& other) {
    std::copy_n(other.sums.data.get(), sums.depth * sums.columns, sums.data.get());
    std::copy_n(other.counts.get(), call.far_columns, counts.get());
    std::copy_n(other.offsets.get(), call.far_columns, offsets.get());
    keys = other.keys;
  }

  void add(const AttentionCall& call, const FarField& other) {
    for (int64_t i = 0; i < sums.depth * sums.columns; ++i) {
      sums.data[i] += other.sums.data[i];
    }
    for (int64_t code = 0; code < call.far_columns; ++code) {
      counts[code] += other.counts[code];
      offsets[code] = std::max(offsets[code], other.offsets[code]);
    }
    keys += other.keys;
  }

  void add(const AttentionCall& call, const Keys& head, int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j) {
      if (head.ignored(j)) {
        continue;
      }
      const int64_t code = head.code(j);
      sums.add_to_row(code, head.v.row(j, buffer.data()), call.value_dim);
      counts[code] += 1.0f;
      offsets[code] = 0.0f;
      ++keys;
    }
  }
};

// The far keys on one side of the blocks. On the side before, step n stands for block n. On the side after, step 0
// stands for the last block, step 1 for the block before it, and so on. So each step only adds far keys.
struct Side {
  bool after;
  int64_t length, reach, steps;

  Side(const AttentionCall& call, int64_t length, bool after)
      : after(after), length(length), reach(call.reach), steps((length + kBlock - 1) / kBlock) {}

  // The block of a step. The same function also gives the step of a block.
  int64_t block(int64_t step) const { return after ? steps - 1 - step : step; }

  // Where the far keys of a step end. On the side after the blocks: where they begin.
  int64_t edge(int64_t step) const {
    const int64_t first = block(step) * kBlock;
    return after ? std::min(length, first + kBlock + reach) : std::max<int64_t>(0, first - reach);
  }

  // Calls use(first, last) for the keys that are far at step `later` but not at step `earlier`. If `earlier` is -1,
  // these are all far keys of step `later`.
  template <typename Use>
  void keys_between(int64_t earlier, int64_t later, const Use& use) const {
    const int64_t start = earlier >= 0 ? edge(earlier) : after ? length : 0, end = edge(later);
    use(std::min(start, end), std::max(start, end));
  }
};

// The far fields of all blocks of a head. Some are stored; the far field of a block is computed from the last stored
// one and the keys since then. Values are never subtracted from a sum: their rounding errors would stay in it.
class FarFields {
 public:
  FarFields(const AttentionCall& call, const Keys& keys, int64_t length, SumLayout layout)
      : call_(call), keys_(keys), before_(call, length, false), after_(call, length, true),
        // Between two stored fields there are about twice as many keys as codes, so the fields take half the memory of
        // the values.
        spacing_(std::max<int64_t>(4, 2 * call.num_codes / kBlock)) {
    if (call.everything_far()) {
      stored_before_.push_back(std::make_unique<FarField>(call, layout));
      stored_before_.back()->add(call, keys, 0, length);
      return;
    }
    stored_before_ = store_fields(before_, layout);
    if (!call.causal) {
      stored_after_ = store_fields(after_, layout);
    }
  }

  // The far field of a block: `field`, filled here, or the one that all blocks share.
  const FarField& of_block(int64_t block, FarField& field) const {
    if (call_.everything_far()) {
      return *stored_before_.front();
    }
    field.keys = 0;
    if (!has_far_keys(block)) {
      return field;
    }
    const FarField* before = stored_before_[block / spacing_].get();
    if (before != nullptr) {
      field.copy(call_, *before);
    } else {
      field.clear(call_);
    }
    add_since(before_, block, field);
    if (!call_.causal) {
      const int64_t step = after_.block(block);
      const FarField* after = stored_after_[step / spacing_].get();
      if (after != nullptr) {
        field.add(call_, *after);
      }
      add_since(after_, step, field);
    }
    return field;
  }

 private:
  using Stored = std::vector<std::unique_ptr<FarField>>;  // nullptr: no far keys yet

  bool has_far_keys(int64_t block) const {
    return before_.edge(block) > 0 || (!call_.causal && after_.edge(after_.block(block)) < after_.length);
  }

  Stored store_fields(const Side& side, SumLayout layout) const {
    Stored stored;
    for (int64_t step = 0; step < side.steps; step += spacing_) {
      std::unique_ptr<FarField> field;
      side.keys_between(step > 0 ? step - spacing_ : -1, step, [&](int64_t a, int64_t b) {
        const FarField* last = step > 0 ? stored.back().get() : nullptr;
        if (a < b || last != nullptr) {
          field = std::make_unique<FarField>(call_, layout);
          if (last != nullptr) {
            field->copy(call_, *last);
          }
          field->add(call_, keys_, a, b);
        }
      });
      stored.push_back(std::move(field));
    }
    return stored;
  }

  void add_since(const Side& side, int64_t step, FarField& field) const {
    side.keys_between(step / spacing_ * spacing_, step, [&](int64_t a, int64_t b) { field.add(call_, keys_, a, b); });
  }

  const AttentionCall& call_;
  const Keys& keys_;
  Side before_, after_;
  int64_t spacing_;  // number of blocks between stored fields
  Stored stored_before_, stored_after_;
};

}  // namespace longvq
