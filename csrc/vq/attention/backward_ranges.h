// Splits the backward of one head into ranges of blocks, which threads compute independently. join() then adds what the
// blocks of different ranges contribute to the same keys, in a fixed order: the result does not depend on which thread
// computes which range, or when. For backward.cpp.
#pragma once

#include <memory>

#include "backward_head.h"

namespace longvq {

// The rows first .. last of the gradient of keys or values that one range contributes to. No other range contributes to
// rows own_first .. own_last, so they are rows of the result itself. The other rows are buffers, which join() adds to
// the result.
class RangeRows {
 public:
  struct Bounds {
    int64_t first, last, own_first, own_last;
  };

  RangeRows(GradientRows& result, const Bounds& bounds)
      : result_(result), bounds_(bounds),
        lower_(CodeGradients::zeros((bounds.own_first - bounds.first) * result.columns)),
        upper_(CodeGradients::zeros((bounds.last - bounds.own_last) * result.columns)) {}

  void add(int64_t j, const float* values, float factor = 1.0f) {
    float* row = j < bounds_.own_first  ? lower_.get() + (j - bounds_.first) * result_.columns
                 : j < bounds_.own_last ? result_.row(j)
                                        : upper_.get() + (j - bounds_.own_last) * result_.columns;
    add_to(row, values, result_.columns, factor);
  }

  void join() const {
    add_to(result_.row(bounds_.first), lower_.get(), (bounds_.own_first - bounds_.first) * result_.columns);
    add_to(result_.row(bounds_.own_last), upper_.get(), (bounds_.last - bounds_.own_last) * result_.columns);
  }

 private:
  GradientRows& result_;
  Bounds bounds_;
  AlignedArray<float> lower_, upper_;
};

class BackwardRanges {
 public:
  BackwardRanges(
      const AttentionCall& call, const Codebooks& codebooks, const BackwardTensors& tensors, const Document& document,
      int64_t kv_head)
      : head_(call, codebooks, tensors, document, kv_head), all_inside_(document.length <= call.window),
        two_sided_(is_two_sided(call, document.length)), before_(call, document.length, false),
        after_(call, document.length, true), blocks_(before_.steps), count_(count_ranges(call, document.length)),
        dk_(tensors.dk, call.type, call.first_row(document, kv_head, call.kv_heads), document.length, call.head_dim),
        dfar_k_(
            tensors.dfar_k, call.type, call.first_row(document, kv_head, call.kv_heads),
            call.has_far_q ? document.length : 0, call.far_head_dim),
        dv_(tensors.dv, call.type, call.first_row(document, kv_head, call.kv_heads), document.length, call.value_dim),
        ranges_(count_) {}

  // The number of ranges, the same for any number of threads. A range has sums for all codes, so it has at least as
  // many positions as there are codes. It also has at least three times as many positions as the keys that two
  // neighbouring ranges share. A two-sided range keeps the gradients of the far field of each of its blocks, so it has
  // at most about 16 blocks, if the first two rules allow that. The number is even, so that two threads finish
  // together.
  static int64_t count_ranges(const AttentionCall& call, int64_t length) {
    constexpr int64_t kItems = 16;  // enough work items for an even distribution
    const int64_t shortest = std::max(call.num_codes, 3 * (kBlock + call.reach));
    const int64_t longest = std::max(shortest, 16 * kBlock);
    const int64_t wanted = (kItems + call.pairs() - 1) / call.pairs(), most = length / shortest;
    const int64_t least = is_two_sided(call, length) ? (length + longest - 1) / longest : 1;
    const int64_t count = std::min(std::max(wanted, least), most);
    return count < 2 ? 1 : count % 2 == 0 ? count : count < most ? count + 1 : count - 1;
  }

  void run(int64_t number, BackwardScratch& scratch) {
    const AttentionCall& call = head_.call;
    ranges_[number] = std::make_unique<Range>(call, !all_inside_, dk_, dv_, bounds_of(number));
    Range& range = *ranges_[number];
    const int64_t first = first_block(number), last = first_block(number + 1);
    // From the last block to the first: when a key stops being far, the sums hold exactly the gradient of its value.
    for (int64_t block = last - 1; block >= first; --block) {
      float* sums = range.codes.values.get();
      float* of_block = two_sided_ ? scratch.clear_block(call, last - 1 - block) : sums;
      head_.attend(block, of_block, range.codes, scratch);
      take_near(range, scratch);
      if (two_sided_) {
        add_to(sums, of_block, call.far_columns * call.value_columns);
      }
      if (!call.everything_far()) {
        before_.keys_between(
            block - 1, block, [&](int64_t a, int64_t b) { take_far(a, b, range.codes.values, range.dv); });
      }
    }
    if (two_sided_) {  // from the first block to the last, for far keys after their blocks
      const AlignedArray<float> sums = CodeGradients::zeros(call.far_columns * call.value_columns);
      for (int64_t block = first; block < last; ++block) {
        add_to(sums.get(), scratch.block_values[last - 1 - block].get(), call.far_columns * call.value_columns);
        const int64_t step = after_.block(block);
        after_.keys_between(step - 1, step, [&](int64_t a, int64_t b) { take_far(a, b, sums, range.dv); });
      }
    }
  }

  // Call this after all ranges have run. Returns the gradients of the bias, (G, 2 W - 1) or empty.
  std::vector<std::vector<double>> join() {
    const AttentionCall& call = head_.call;
    if (!call.everything_far()) {
      for (const auto& range : ranges_) {
        range->dk.join();
        range->dv.join();
      }
    }
    if (!all_inside_) {
      add_far_of_other_ranges();
    }
    CodeGradients& all = ranges_.front()->codes;
    for (int64_t n = 1; n < count_; ++n) {
      const CodeGradients& more = ranges_[n]->codes;
      const int64_t codewords = call.shares_gradients ? call.far_columns * call.far_head_columns : 0;
      add_to(all.codewords.get(), more.codewords.get(), codewords);
      for (int64_t g = 0; g < call.group; ++g) {
        for (std::size_t i = 0; i < all.bias[g].size(); ++i) {
          all.bias[g][i] += more.bias[g][i];
        }
      }
    }
    if (call.shares_gradients && !all_inside_) {
      share_codewords(all.codewords);
    }
    dk_.finish();
    dfar_k_.finish();
    dv_.finish();
    return std::move(all.bias);
  }

 private:
  struct Range {
    CodeGradients codes;
    RangeRows dk, dv;

    Range(const AttentionCall& call, bool far, GradientRows& dk, GradientRows& dv, const RangeRows::Bounds& bounds)
        : codes(call, far, far && call.shares_gradients), dk(dk, bounds), dv(dv, bounds) {}
  };

  // Whether keys can be far before one block and far after another.
  static bool is_two_sided(const AttentionCall& call, int64_t length) {
    return !call.causal && !call.everything_far() && length > call.window;
  }

  int64_t first_block(int64_t range) const { return blocks_ * range / count_; }

  // The keys that a range contributes to: its near keys, and the keys that stop being far at one of its blocks.
  int64_t first_key(int64_t range) const {
    const int64_t first = first_block(range);
    return first == 0 ? 0 : before_.edge(first - 1);
  }
  int64_t last_key(int64_t range) const {
    const int64_t last = first_block(range + 1);
    return last == blocks_ ? head_.length : head_.call.causal ? last * kBlock : after_.edge(after_.block(last));
  }

  RangeRows::Bounds bounds_of(int64_t range) const {
    const int64_t first = first_key(range), last = last_key(range);
    const int64_t own_first = range == 0 ? first : last_key(range - 1);
    const int64_t own_last = range + 1 == count_ ? last : std::max(own_first, first_key(range + 1));
    return {first, last, own_first, own_last};
  }

  // Adds the gradients of the sums of far values to the values of keys first .. last.
  template <typename Rows>
  void take_far(int64_t first, int64_t last, const AlignedArray<float>& values, Rows& dv) const {
    for (int64_t j = first; j < last; ++j) {
      if (!head_.keys.ignored(j)) {
        dv.add(j, values.get() + head_.keys.code(j) * head_.call.value_columns);
      }
    }
  }

  // Adds the gradients of the near keys of a block, which are in the scratch.
  void take_near(Range& range, BackwardScratch& scratch) const {
    const AttentionCall& call = head_.call;
    for (int64_t c = 0; c < scratch.near.columns; ++c) {
      if (scratch.near.offsets[c] != 0.0f) {  // masked or padding
        continue;
      }
      const int64_t j = scratch.near.first + c;
      range.dv.add(j, scratch.d_near_values.get() + c * call.value_columns);
      range.dk.add(j, scratch.d_keys_inside.get() + c * call.head_columns);
      if (call.shares_gradients && !all_inside_) {
        add_to(
            range.codes.codewords.get() + head_.keys.code(j) * call.far_head_columns,
            scratch.d_keys_outside.get() + c * call.far_head_columns, call.far_head_dim);
      }
    }
  }

  // Adds the gradients of far values from blocks of later ranges, then from blocks of earlier ranges.
  void add_far_of_other_ranges() {
    const AttentionCall& call = head_.call;
    RangeRows dv(dv_, {0, head_.length, 0, head_.length});
    const int64_t sums = call.far_columns * call.value_columns;
    AlignedArray<float> others = CodeGradients::zeros(sums);
    for (int64_t n = count_ - 1; n >= 0; --n) {
      if (!call.everything_far()) {
        before_.keys_between(
            first_block(n) - 1, first_block(n + 1) - 1, [&](int64_t a, int64_t b) { take_far(a, b, others, dv); });
      }
      add_to(others.get(), ranges_[n]->codes.values.get(), sums);
    }
    if (call.everything_far()) {
      take_far(0, head_.length, others, dv);
    } else if (!call.causal) {
      std::fill_n(others.get(), sums, 0.0f);
      for (int64_t n = 0; n < count_; ++n) {
        after_.keys_between(
            after_.block(first_block(n + 1) - 1) - 1, after_.block(first_block(n)),
            [&](int64_t a, int64_t b) { take_far(a, b, others, dv); });
        add_to(others.get(), ranges_[n]->codes.values.get(), sums);
      }
    }
  }

  // Divides the gradient of each codeword equally among the keys of its code.
  void share_codewords(const AlignedArray<float>& codewords) {
    const AttentionCall& call = head_.call;
    GradientRows& dk = call.has_far_q ? dfar_k_ : dk_;
    std::vector<float> counts(call.num_codes, 0.0f);
    for (int64_t j = 0; j < head_.length; ++j) {
      counts[head_.keys.code(j)] += head_.keys.ignored(j) ? 0.0f : 1.0f;
    }
    for (int64_t j = 0; j < head_.length; ++j) {
      const int64_t code = head_.keys.code(j);
      if (!head_.keys.ignored(j)) {
        add_to(dk.row(j), codewords.get() + code * call.far_head_columns, call.far_head_dim, 1.0f / counts[code]);
      }
    }
  }

  BackwardHead head_;
  bool all_inside_;  // every key is inside the window of every query
  bool two_sided_;
  Side before_, after_;
  int64_t blocks_, count_;
  GradientRows dk_, dfar_k_, dv_;
  std::vector<std::unique_ptr<Range>> ranges_;
};

}  // namespace longvq
