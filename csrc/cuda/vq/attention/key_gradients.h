// Gradients of codewords, keys and values: a block of codes, or of keys, past the queries that see them.
#pragma once

#include "key_block.h"

namespace longvq::cuda {
namespace {

// Codewords, past the queries of a segment from the last to the first: when a key stops being far, what has been
// gathered for its code comes from queries that saw it from afar, and is the gradient of its value. For keys behind the
// other way round. Keys get what comes from other segments of queries afterwards.
template <typename Element, int DEPTH, int VALUES, Makes MAKES>
struct CodeGradient : KeyBlock<Element, DEPTH, VALUES, MAKES> {
  using Base = KeyBlock<Element, DEPTH, VALUES, MAKES>;
  using Operand = typename Base::Operand;
  using Base::Base, Base::dkeys, Base::dvalues, Base::first, Base::first_value, Base::g, Base::head, Base::p;
  using typename Base::Pairs;

  LONGVQ_DEVICE int64_t reach() const { return max(p.window, int64_t{1}); }
  LONGVQ_DEVICE int64_t before(int64_t field) const {
    return min(max(field * kFarBlock - reach() + 1, int64_t{0}), int64_t{head.length});
  }
  LONGVQ_DEVICE int64_t behind(int64_t field) const {
    return min((field + 1) * kFarBlock - 1 + reach(), int64_t{head.length});
  }

  LONGVQ_DEVICE void gather(int64_t begin, int64_t end, bool codes_too) {
    const auto row_of = [&](int row) { return first + row < p.codebook.codes ? first + row : -1; };
    const auto fill_means = [&](int64_t slice) {
      const auto rows = head.template means<Element>(begin, slice, this->columns_of_values(slice));
      fill<Operand, kThreads>(this->values(), rows, row_of);
    };
    __syncthreads();
    fill_means(first_value);
    commit_copies();
    float numbers[2];  // the same for all these queries, which have one far field
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int code = first + this->row(half);
      numbers[half] = code < p.codebook.codes ? head.numbers(begin)[code] : 0.0f;
    }
    this->past_queries(begin, end, true, [&](const Head& of, int64_t query, int tile) {
      Pairs weights = {}, dscores = {};
      const auto score_of = [](int64_t, int, float score) { return score; };
      this->weigh(weights, dscores, of, query, end, tile, numbers, score_of, fill_means);
      if (MAKES != kKeysOnly) {
        multiply_weights<Operand>(dvalues, weights, this->grads(tile));
      }
      if (MAKES != kValuesOnly && codes_too) {
        multiply_weights<Operand>(dkeys, dscores, this->queries(tile));
      }
    });
  }

  // Gives keys begin .. end what was gathered for their codes.
  LONGVQ_DEVICE void give(float* array, int64_t begin, int64_t end) const {
    if (begin >= end || MAKES == kKeysOnly) {
      return;  // the same for all threads
    }
    const int columns = this->columns_of_values(first_value);
    __syncthreads();
    this->write(dvalues, columns, [&](int row) { return this->stage(row); }, 1 / Base::kWeightScale);
    __syncthreads();
    // A lane looks at one of 32 keys; all lanes write the values of those that have codes of this block.
    for (int64_t from = begin + this->warp * 32; from < end; from += kThreads) {
      const int64_t mine = from + this->lane;
      const bool there = mine < end && !head.ignored(mine);
      const int own = there ? static_cast<int>(head.code_of(mine)) - first : -1;
      uint32_t left = ballot(own >= 0 && own < Base::kRows);
      while (left != 0) {
        const int of = lowest_bit(left), row = shuffle_from(own, of);
        left &= left - 1;
        float* to = array + head.place_of_key(from + of) * p.values + first_value;
        for (int column = this->lane; column < columns; column += 32) {
          to[column] = this->stage(row)[column];
        }
      }
    }
    __syncthreads();
  }

  LONGVQ_DEVICE void run() {
    const Piece piece = piece_of(p, g.code_segment, blockIdx.z / p.batch, blockIdx.z % p.batch);
    if (!piece.there(g.code_segment)) {
      return;
    }
    head.enter(piece.of);
    first = static_cast<int>(blockIdx.x) * Base::kRows;
    fill_packed<kThreads>(
        this->keys(), head.template codewords<Operand::kParts, DEPTH>(), padded_codes(p.codebook.codes),
        [&](int row) { return first + row < p.codebook.codes ? first + row : -1; });
    const int64_t begin = piece.index * g.code_segment, end = min(begin + g.code_segment, int64_t{head.length});
    const int64_t segment = (head.batch * p.kv_heads + head.kv_head) * p.pieces(g.code_segment) +
                            piece.of.first_piece(p, g.code_segment) + piece.index;
    // Keys before their queries, then those behind. One loop: of more, all with their products, registers spill.
    for (bool ahead = false;; ahead = true) {
      const int64_t least = p.all_far() ? 0 : max(begin / kFarBlock, int64_t{p.causal && !ahead});
      const int64_t fields = p.all_far() ? 1 : divide_up(end, kFarBlock);
      for (int64_t number = least; number < fields; ++number) {
        const int64_t field = ahead ? number : least + fields - 1 - number;
        past_field(field, begin, end, ahead);
      }
      if (!ahead) {
        write_sums(segment);
      }
      if (ahead || MAKES == kKeysOnly || g.dv_ahead == nullptr) {
        return;
      }
      Base::clear(dvalues);
    }
  }

  LONGVQ_DEVICE void past_field(int64_t field, int64_t begin, int64_t end, bool ahead) {
    const int64_t length = head.length;
    if (!p.all_far()) {
      begin = field * kFarBlock, end = min(begin + kFarBlock, length);
    }
    gather(begin, end, !ahead);
    int64_t from = 0, to = g.code_values == nullptr ? length : 0;
    if (ahead) {
      from = behind(field), to = end < length ? behind(field + 1) : length;
    } else if (!p.all_far()) {
      from = field > 0 ? before(field - 1) : 0, to = before(field);
    }
    give(ahead ? g.dv_ahead : g.dv_far, from, to);
  }

  LONGVQ_DEVICE void write_sums(int64_t segment) const {
    const auto place_of = [&](float* array, int row, int64_t columns) {
      return first + row < p.codebook.codes ? array + (segment * p.codebook.codes + first + row) * columns : nullptr;
    };
    if (MAKES != kValuesOnly) {
      this->write(dkeys, p.far_depth, [&](int row) { return place_of(g.dcodes, row, p.far_depth); });
    }
    if (MAKES != kKeysOnly && g.code_values != nullptr) {
      const auto to = [&](int row) {
        float* place = place_of(g.code_values, row, p.values);
        return place == nullptr ? nullptr : place + first_value;
      };
      this->write(dvalues, this->columns_of_values(first_value), to, 1 / Base::kWeightScale);
    }
  }
};

// Keys near their queries, one by one: pairs inside the window, then those outside.
template <typename Element, int DEPTH, int VALUES, Makes MAKES>
struct NearGradient : KeyBlock<Element, DEPTH, VALUES, MAKES> {
  using Base = KeyBlock<Element, DEPTH, VALUES, MAKES>;
  using Operand = typename Base::Operand;
  using Base::Base, Base::dkeys, Base::dvalues, Base::first, Base::first_value, Base::g, Base::head, Base::p;
  using typename Base::Pairs;

  LONGVQ_DEVICE int last() const { return min(first + Base::kRows, head.length); }

  LONGVQ_DEVICE void gather(bool inside) {
    const auto row_of = [&](int row) { return first + row < last() ? first + row : -1; };
    const bool exact = inside && p.exact;
    if (exact) {
      fill<Operand, kThreads>(this->keys(), head.template keys<Element>(this->aligned.k), row_of);
    } else {
      fill_packed<kThreads>(
          this->keys(), head.template codewords<Operand::kParts, DEPTH>(), padded_codes(p.codebook.codes),
          [&](int row) { return first + row < last() ? head.code_of(first + row) : -1; });
    }
    commit_copies();
    const int64_t reach = max(p.window, int64_t{1});
    // Queries that may see one of these keys so; each pair is looked at.
    const int64_t begin = inside ? (p.causal ? first : first - p.window + 1)
                                 : (p.causal ? first : (first - reach + 1) / kFarBlock * kFarBlock - kFarBlock);
    const int64_t end = inside ? last() - 1 + p.window : ((last() - 1 + reach - 1) / kFarBlock + 1) * kFarBlock;
    const auto score_of = [&](const Head& of, int64_t query, int row, float score) {
      const int64_t key = first + row, block = query / kFarBlock * kFarBlock;
      const bool near = key > block - reach && (p.causal || key < block + kFarBlock - 1 + reach);
      const Columns::Kind kind = inside ? Columns::kInside : Columns::kOutside;
      return near ? of.score_of_key(kind, static_cast<int>(key - query), score) : -INFINITY;
    };
    const int64_t stop = min(end, int64_t{head.length});
    float numbers[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = first + this->row(half);
      numbers[half] = key < last() && !head.ignored(key) ? 1.0f : 0.0f;
    }
    this->past_queries(max(begin, int64_t{0}), stop, !exact, [&](const Head& of, int64_t query, int tile) {
      Pairs weights = {}, dscores = {};
      const auto score = [&](int64_t i, int row, float product) { return score_of(of, i, row, product); };
      const auto fill_slice = [&](int64_t slice) { fill_values(slice); };
      this->weigh(weights, dscores, of, query, stop, tile, numbers, score, fill_slice);
      if (MAKES != kKeysOnly) {
        multiply_weights<Operand>(dvalues, weights, this->grads(tile));
      }
      if (MAKES != kValuesOnly) {
        multiply_weights<Operand>(dkeys, dscores, this->queries(tile));
      }
    });
    if (MAKES == kValuesOnly) {
      return;
    }
    float* to = inside ? g.dk_inside : g.dk_outside;
    const int64_t columns = exact ? p.near_depth : p.far_depth;
    this->write(dkeys, columns, [&](int row) { return place_of(to, row, columns); });
    Base::clear(dkeys);
  }

  LONGVQ_DEVICE float* place_of(float* array, int row, int64_t columns) const {
    return first + row < last() ? array + head.place_of_key(first + row) * columns : nullptr;
  }

  LONGVQ_DEVICE void fill_values(int64_t slice) const {
    const auto rows = head.template values<Element>(slice, this->columns_of_values(slice), this->aligned.v);
    fill<Operand, kThreads>(this->values(), rows, [&](int row) { return first + row < last() ? first + row : -1; });
  }

  LONGVQ_DEVICE void run() {
    const Piece piece = piece_of(p, Base::kRows, blockIdx.x, blockIdx.z);
    head.enter(piece.of);
    first = static_cast<int>(piece.index) * Base::kRows;
    if (first >= head.length) {
      return;  // the whole block
    }
    fill_values(first_value);
    if (p.window > 0) {
      gather(true);
    } else if (MAKES != kValuesOnly) {
      this->write(dkeys, p.near_depth, [&](int row) { return place_of(g.dk_inside, row, p.near_depth); });
    }
    if (!p.all_far()) {
      gather(false);
    } else if (MAKES != kValuesOnly) {
      this->write(dkeys, p.far_depth, [&](int row) { return place_of(g.dk_outside, row, p.far_depth); });
    }
    if (MAKES != kKeysOnly) {
      const auto to = [&](int row) {
        float* place = place_of(g.dv_near, row, p.values);
        return place == nullptr ? nullptr : place + first_value;
      };
      this->write(dvalues, this->columns_of_values(first_value), to, 1 / Base::kWeightScale);
    }
  }
};

template <typename Element, int DEPTH, int VALUES, Makes MAKES>
__global__ void __launch_bounds__(kThreads, 2) differentiate_codes(AttentionGradients g, Alignment alignment) {
  CodeGradient<Element, DEPTH, VALUES, MAKES>(g, alignment).run();
}

template <typename Element, int DEPTH, int VALUES, Makes MAKES>
__global__ void __launch_bounds__(kThreads, 2) differentiate_near(AttentionGradients g, Alignment alignment) {
  NearGradient<Element, DEPTH, VALUES, MAKES>(g, alignment).run();
}

}  // namespace
}  // namespace longvq::cuda
