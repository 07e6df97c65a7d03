// Sums over the keys that a block of queries sees only through their codes.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "call.h"

namespace longvq {

// How the sums lie in memory: as panels of the kernels, or as plain rows, which will be packed into columns.
enum class Sums { kPanels, kRows };

// Numbers of the far keys of each code and sums of their values.
struct FarField {
  Panels sums;  // (far_columns, value_columns)
  AlignedArray<float> counts, offsets;
  std::vector<float> buffer;
  int64_t keys = 0;

  FarField(const Problem& p, Sums layout)
      : sums(p.far_columns, p.value_columns, layout == Sums::kPanels ? p.kernel.panel : p.value_columns),
        counts(aligned_array<float>(p.far_columns)), offsets(aligned_array<float>(p.far_columns)), buffer(p.values) {
    clear(p);
  }

  void clear(const Problem& p) {
    sums.clear();
    std::fill_n(counts.get(), p.far_columns, 0.0f);
    // Under softmax a code without a far key must not set the largest score.
    std::fill_n(offsets.get(), p.far_columns, p.activation == Activation::kSoftmax ? -kInfinity : 0.0f);
    keys = 0;
  }

  void copy(const Problem& p, const FarField& other) {
    std::copy_n(other.sums.data.get(), sums.depth * sums.columns, sums.data.get());
    std::copy_n(other.counts.get(), p.far_columns, counts.get());
    std::copy_n(other.offsets.get(), p.far_columns, offsets.get());
    keys = other.keys;
  }

  void add(const Problem& p, const FarField& other) {
    for (int64_t i = 0; i < sums.depth * sums.columns; ++i) {
      sums.data[i] += other.sums.data[i];
    }
    for (int64_t code = 0; code < p.far_columns; ++code) {
      counts[code] += other.counts[code];
      offsets[code] = std::max(offsets[code], other.offsets[code]);
    }
    keys += other.keys;
  }

  void add(const Problem& p, const Keys& of, int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j) {
      if (of.ignored(j)) {
        continue;
      }
      const int64_t code = of.code(j);
      sums.add_to_row(code, of.v.row(j, buffer.data()), p.values);
      counts[code] += 1.0f;
      offsets[code] = 0.0f;
      ++keys;
    }
  }
};

// The far keys on one side of the blocks. Step by step they grow: before block 0, 1, .. or behind the last, the last
// but one, ...
struct Side {
  bool behind;
  int64_t length, reach, steps;

  Side(const Problem& p, int64_t length, bool behind)
      : behind(behind), length(length), reach(p.reach), steps((length + kBlock - 1) / kBlock) {}

  // Its own inverse.
  int64_t block(int64_t step) const { return behind ? steps - 1 - step : step; }

  // Where the far keys of a step end (or, behind, begin); of step -1, before the first, there are none.
  int64_t edge(int64_t step) const {
    const int64_t first = block(step) * kBlock;
    return behind ? std::min(length, first + kBlock + reach) : std::max<int64_t>(0, first - reach);
  }

  // use(first, last) of the keys that are far at step `later` and were not at step `earlier`, -1 for none.
  template <typename Use>
  void keys_between(int64_t earlier, int64_t later, const Use& use) const {
    const int64_t start = earlier >= 0 ? edge(earlier) : behind ? length : 0, end = edge(later);
    use(std::min(start, end), std::max(start, end));
  }
};

// The far fields of all blocks of a head. A few are kept; the one of a block is the last kept before it and the keys in
// between. Nothing is ever taken out of a sum, which would leave the rounding of what is gone.
class FarFields {
 public:
  FarFields(const Problem& p, const Keys& keys, int64_t length, Sums layout)
      : p_(p), keys_(keys), before_(p, length, false), behind_(p, length, true),
        // About twice as many keys between two as there are codes: they take half the memory of the values.
        spacing_(std::max<int64_t>(4, 2 * p.num_codes / kBlock)) {
    if (p.everything_far()) {
      kept_before_.push_back(std::make_unique<FarField>(p, layout));
      kept_before_.back()->add(p, keys, 0, length);
      return;
    }
    kept_before_ = keep(before_, layout);
    if (!p.causal) {
      kept_behind_ = keep(behind_, layout);
    }
  }

  // In `field` or, where one serves all blocks, in place.
  const FarField& of_block(int64_t block, FarField& field) const {
    if (p_.everything_far()) {
      return *kept_before_.front();
    }
    field.keys = 0;
    if (!has_far_keys(block)) {
      return field;
    }
    const FarField* before = kept_before_[block / spacing_].get();
    if (before != nullptr) {
      field.copy(p_, *before);
    } else {
      field.clear(p_);
    }
    add_since(before_, block, field);
    if (!p_.causal) {
      const int64_t step = behind_.block(block);
      const FarField* behind = kept_behind_[step / spacing_].get();
      if (behind != nullptr) {
        field.add(p_, *behind);
      }
      add_since(behind_, step, field);
    }
    return field;
  }

 private:
  using Kept = std::vector<std::unique_ptr<FarField>>;  // nullptr: no far key yet

  bool has_far_keys(int64_t block) const {
    return before_.edge(block) > 0 || (!p_.causal && behind_.edge(behind_.block(block)) < behind_.length);
  }

  Kept keep(const Side& side, Sums layout) const {
    Kept kept;
    for (int64_t step = 0; step < side.steps; step += spacing_) {
      std::unique_ptr<FarField> field;
      side.keys_between(step > 0 ? step - spacing_ : -1, step, [&](int64_t a, int64_t b) {
        const FarField* last = step > 0 ? kept.back().get() : nullptr;
        if (a < b || last != nullptr) {
          field = std::make_unique<FarField>(p_, layout);
          if (last != nullptr) {
            field->copy(p_, *last);
          }
          field->add(p_, keys_, a, b);
        }
      });
      kept.push_back(std::move(field));
    }
    return kept;
  }

  void add_since(const Side& side, int64_t step, FarField& field) const {
    side.keys_between(step / spacing_ * spacing_, step, [&](int64_t a, int64_t b) { field.add(p_, keys_, a, b); });
  }

  const Problem& p_;
  const Keys& keys_;
  Side before_, behind_;
  int64_t spacing_;  // blocks from one kept field to the next
  Kept kept_before_, kept_behind_;
};

}  // namespace longvq
