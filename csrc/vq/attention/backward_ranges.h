// The backward of one head in parts, which are its blocks from one to another. A part can be computed by itself, but
// for what the blocks of other parts have found for the same keys: join() adds that up, in order, so that the result
// doesn't depend on who computes which part when. For attention_backward_cpu.cpp.
#pragma once

#include <memory>

#include "backward_head.h"

namespace longvq {

// Rows first .. last of the gradients of keys or values, as far as one part reaches. Rows that no other part reaches
// are those of the result, of the others it has its own.
class PartRows {
 public:
  struct Range {
    int64_t first, last, own_first, own_last;
  };

  PartRows(GradientRows& all, const Range& range)
      : all_(all), range_(range), lower_(CodeGradients::zeros((range.own_first - range.first) * all.columns)),
        upper_(CodeGradients::zeros((range.last - range.own_last) * all.columns)) {}

  void add(int64_t j, const float* values, float factor = 1.0f) {
    float* row = j < range_.own_first  ? lower_.get() + (j - range_.first) * all_.columns
                 : j < range_.own_last ? all_.row(j)
                                       : upper_.get() + (j - range_.own_last) * all_.columns;
    add_to(row, values, all_.columns, factor);
  }

  void join() const {
    add_to(all_.row(range_.first), lower_.get(), (range_.own_first - range_.first) * all_.columns);
    add_to(all_.row(range_.own_last), upper_.get(), (range_.last - range_.own_last) * all_.columns);
  }

 private:
  GradientRows& all_;
  Range range_;
  AlignedArray<float> lower_, upper_;
};

class GradientParts {
 public:
  GradientParts(
      const Problem& p, const Codebooks& codebooks, const GradientTensors& tensors, const Document& document,
      int64_t kv_head)
      : head_(p, codebooks, tensors, document, kv_head), all_inside_(document.length <= p.window),
        both_sides_(two_sided(p, document.length)), before_(p, document.length, false),
        behind_(p, document.length, true), blocks_(before_.steps), count_(parts_of(p, document.length)),
        dk_(tensors.dk, p.type, p.place(document, kv_head, p.kv_heads), document.length, p.near_depth),
        dfar_k_(
            tensors.dfar_k, p.type, p.place(document, kv_head, p.kv_heads), p.has_far_q ? document.length : 0,
            p.far_depth),
        dv_(tensors.dv, p.type, p.place(document, kv_head, p.kv_heads), document.length, p.values), parts_(count_) {}

  // The same for any number of threads. Parts are no shorter than the codes are many, for each has sums for all of
  // them, and several times as long as what two of them both reach. With keys on both sides the sums of each block are
  // kept while a part is computed, so it is not much longer than that. An even number, so that two threads end
  // together.
  static int64_t parts_of(const Problem& p, int64_t length) {
    constexpr int64_t kItems = 16;  // enough to share out evenly
    const int64_t shortest = std::max(p.num_codes, 3 * (kBlock + p.reach)), longest = std::max(shortest, 16 * kBlock);
    const int64_t wanted = (kItems + p.pairs() - 1) / p.pairs(), most = length / shortest;
    const int64_t least = two_sided(p, length) ? (length + longest - 1) / longest : 1;
    const int64_t parts = std::min(std::max(wanted, least), most);
    return parts < 2 ? 1 : parts % 2 == 0 ? parts : parts < most ? parts + 1 : parts - 1;
  }

  void run(int64_t number, GradientScratch& scratch) {
    const Problem& p = head_.p;
    parts_[number] = std::make_unique<Part>(p, !all_inside_, dk_, dv_, range_of(number));
    Part& part = *parts_[number];
    const int64_t first = first_block(number), last = first_block(number + 1);
    // From the last block to the first: a key has its gradient when it stops being far.
    for (int64_t block = last - 1; block >= first; --block) {
      float* sums = part.codes.values.get();
      float* own = both_sides_ ? scratch.clear_block(p, last - 1 - block) : sums;
      head_.attend(block, own, part.codes, scratch);
      take_near(part, scratch);
      if (both_sides_) {
        add_to(sums, own, p.far_columns * p.value_columns);
      }
      if (!p.everything_far()) {
        before_.keys_between(
            block - 1, block, [&](int64_t a, int64_t b) { take_far(a, b, part.codes.values, part.dv); });
      }
    }
    if (both_sides_) {  // and from the first to the last for keys that are far behind
      const AlignedArray<float> sums = CodeGradients::zeros(p.far_columns * p.value_columns);
      for (int64_t block = first; block < last; ++block) {
        add_to(sums.get(), scratch.block_values[last - 1 - block].get(), p.far_columns * p.value_columns);
        const int64_t step = behind_.block(block);
        behind_.keys_between(step - 1, step, [&](int64_t a, int64_t b) { take_far(a, b, sums, part.dv); });
      }
    }
  }

  // When all have run. Returns the gradients of the biases, (G, 2 W - 1) or empty.
  std::vector<std::vector<double>> join() {
    const Problem& p = head_.p;
    if (!p.everything_far()) {
      for (const auto& part : parts_) {
        part->dk.join();
        part->dv.join();
      }
    }
    if (!all_inside_) {
      add_far();
    }
    CodeGradients& all = parts_.front()->codes;
    for (int64_t n = 1; n < count_; ++n) {
      const CodeGradients& more = parts_[n]->codes;
      add_to(all.codewords.get(), more.codewords.get(), p.cluster ? p.far_columns * p.far_depth_columns : 0);
      for (int64_t g = 0; g < p.group; ++g) {
        for (std::size_t i = 0; i < all.bias[g].size(); ++i) {
          all.bias[g][i] += more.bias[g][i];
        }
      }
    }
    if (p.cluster && !all_inside_) {
      take_codewords(all.codewords);
    }
    dk_.finish();
    dfar_k_.finish();
    dv_.finish();
    return std::move(all.bias);
  }

 private:
  struct Part {
    CodeGradients codes;
    PartRows dk, dv;

    Part(const Problem& p, bool far, GradientRows& dk, GradientRows& dv, const PartRows::Range& range)
        : codes(p, far, far && p.cluster), dk(dk, range), dv(dv, range) {}
  };

  static bool two_sided(const Problem& p, int64_t length) {
    return !p.causal && !p.everything_far() && length > p.window;
  }

  int64_t first_block(int64_t part) const { return blocks_ * part / count_; }

  // The keys that a part adds something to: near ones, and those that stop being far at one of its blocks.
  int64_t reaches_from(int64_t part) const {
    const int64_t first = first_block(part);
    return first == 0 ? 0 : before_.edge(first - 1);
  }
  int64_t reaches_to(int64_t part) const {
    const int64_t last = first_block(part + 1);
    return last == blocks_ ? head_.length : head_.p.causal ? last * kBlock : behind_.edge(behind_.block(last));
  }

  PartRows::Range range_of(int64_t part) const {
    const int64_t first = reaches_from(part), last = reaches_to(part);
    const int64_t own_first = part == 0 ? first : reaches_to(part - 1);
    const int64_t own_last = part + 1 == count_ ? last : std::max(own_first, reaches_from(part + 1));
    return {first, last, own_first, own_last};
  }

  template <typename Rows>
  void take_far(int64_t first, int64_t last, const AlignedArray<float>& values, Rows& dv) const {
    for (int64_t j = first; j < last; ++j) {
      if (!head_.keys.ignored(j)) {
        dv.add(j, values.get() + head_.keys.code(j) * head_.p.value_columns);
      }
    }
  }

  void take_near(Part& part, GradientScratch& scratch) const {
    const Problem& p = head_.p;
    for (int64_t c = 0; c < scratch.near.columns; ++c) {
      if (scratch.near.offsets[c] != 0.0f) {  // masked or padding
        continue;
      }
      const int64_t j = scratch.near.first + c;
      part.dv.add(j, scratch.d_near_values.get() + c * p.value_columns);
      part.dk.add(j, scratch.d_inside.get() + c * p.near_depth_columns);
      if (p.cluster && !all_inside_) {
        add_to(
            part.codes.codewords.get() + head_.keys.code(j) * p.far_depth_columns,
            scratch.d_outside.get() + c * p.far_depth_columns, p.far_depth);
      }
    }
  }

  // What the blocks of later parts have found for keys that are far before them, then of earlier parts.
  void add_far() {
    const Problem& p = head_.p;
    PartRows dv(dv_, {0, head_.length, 0, head_.length});
    const int64_t sums = p.far_columns * p.value_columns;
    AlignedArray<float> others = CodeGradients::zeros(sums);
    for (int64_t n = count_ - 1; n >= 0; --n) {
      if (!p.everything_far()) {
        before_.keys_between(
            first_block(n) - 1, first_block(n + 1) - 1, [&](int64_t a, int64_t b) { take_far(a, b, others, dv); });
      }
      add_to(others.get(), parts_[n]->codes.values.get(), sums);
    }
    if (p.everything_far()) {
      take_far(0, head_.length, others, dv);
    } else if (!p.causal) {
      std::fill_n(others.get(), sums, 0.0f);
      for (int64_t n = 0; n < count_; ++n) {
        behind_.keys_between(
            behind_.block(first_block(n + 1) - 1) - 1, behind_.block(first_block(n)),
            [&](int64_t a, int64_t b) { take_far(a, b, others, dv); });
        add_to(others.get(), parts_[n]->codes.values.get(), sums);
      }
    }
  }

  // The keys of a code share its gradient.
  void take_codewords(const AlignedArray<float>& codewords) {
    const Problem& p = head_.p;
    GradientRows& dk = p.has_far_q ? dfar_k_ : dk_;
    std::vector<float> share(p.num_codes, 0.0f);
    for (int64_t j = 0; j < head_.length; ++j) {
      share[head_.keys.code(j)] += head_.keys.ignored(j) ? 0.0f : 1.0f;
    }
    for (int64_t j = 0; j < head_.length; ++j) {
      const int64_t code = head_.keys.code(j);
      if (!head_.keys.ignored(j)) {
        add_to(dk.row(j), codewords.get() + code * p.far_depth_columns, p.far_depth, 1.0f / share[code]);
      }
    }
  }

  GradientHead head_;
  bool all_inside_;  // every key in the window of every query
  bool both_sides_;  // keys can be far before a block or behind it
  Side before_, behind_;
  int64_t blocks_, count_;
  GradientRows dk_, dfar_k_, dv_;
  std::vector<std::unique_ptr<Part>> parts_;
};

}  // namespace longvq
