// The gradients of codewords, and of the values of far keys.
#pragma once

#include "key_block.h"

namespace longvq::cuda {
namespace {

// A block of codes and one segment of queries.
//
// Keys before their queries: the block visits the queries from the last to the first, and sums the value gradient of
// each code. A key is in the far fields of all queries from some query on. When the block has visited that query, the
// sum of the key's code contains exactly the queries whose far field has the key. So the sum is the gradient of the
// key's value. Keys after their queries: the same, from the first query to the last. Later kernels add the gradients
// from the queries of other segments, see SumSegments and FinishKeys.
template <typename Element, int HEAD_DIM, int VALUE_DIM, Outputs OUTPUTS>
struct CodeGradient : KeyBlock<Element, HEAD_DIM, VALUE_DIM, OUTPUTS> {
  using Base = KeyBlock<Element, HEAD_DIM, VALUE_DIM, OUTPUTS>;
  using Base::Base, Base::dkeys, Base::dvalues, Base::first, Base::first_value, Base::g, Base::head, Base::p;
  using typename Base::Operand, typename Base::Pairs;

  LONGVQ_DEVICE int64_t reach() const { return max(p.options.window, int64_t{1}); }
  // Keys near_begin .. near_end are not in the far field.
  LONGVQ_DEVICE int64_t near_begin(int64_t field) const {
    return min(max(field * kFarBlock - reach() + 1, int64_t{0}), int64_t{head.length});
  }
  LONGVQ_DEVICE int64_t near_end(int64_t field) const {
    return min((field + 1) * kFarBlock - 1 + reach(), int64_t{head.length});
  }

  // Adds the gradients from queries begin .. end, which have one far field, to dvalues and, with_keys, to dkeys.
  LONGVQ_DEVICE void accumulate(int64_t begin, int64_t end, bool with_keys) {
    const auto row_of = [&](int row) { return first + row < p.codebook.num_codes ? first + row : -1; };
    const auto fill_means = [&](int64_t slice) {
      const auto rows = head.template means<Element>(begin, slice, columns_of_slice<VALUE_DIM>(p, slice));
      fill<Operand, kThreads>(this->values(), rows, row_of);
    };
    __syncthreads();
    fill_means(first_value);
    commit_copies();
    float counts[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int code = first + this->row(half);
      counts[half] = code < p.codebook.num_codes ? head.counts(begin)[code] : 0.0f;
    }
    this->for_each_query_tile(begin, end, true, [&](const Head& query_head, int64_t query, int tile) {
      Pairs weights = {}, dscores = {};
      const auto score_of = [](int64_t, int, float score) { return score; };
      this->weights_and_dscores(weights, dscores, query_head, query, end, tile, counts, score_of, fill_means);
      if (OUTPUTS != kKeysOnly) {
        multiply_weights<Operand>(dvalues, weights, this->grads(tile));
      }
      if (OUTPUTS != kValuesOnly && with_keys) {
        multiply_weights<Operand>(dkeys, dscores, this->queries(tile));
      }
    });
  }

  // Writes, for each of the keys begin .. end, the sum of the key's code.
  LONGVQ_DEVICE void scatter_to_keys(float* array, int64_t begin, int64_t end) const {
    if (begin >= end || OUTPUTS == kKeysOnly) {
      return;  // the same for all threads
    }
    const int columns = columns_of_slice<VALUE_DIM>(p, first_value);
    __syncthreads();
    this->write(dvalues, columns, [&](int row) { return this->stage(row); }, 1 / Base::kWeightScale);
    __syncthreads();
    // Each lane reads the code of one of 32 keys. Then all lanes write the columns of each key whose code is in this
    // block.
    for (int64_t from = begin + this->warp * 32; from < end; from += kThreads) {
      const int64_t key = from + this->lane;
      const bool valid = key < end && !head.ignored(key);
      const int code = valid ? static_cast<int>(head.code_of(key)) - first : -1;
      uint32_t left = ballot(code >= 0 && code < Base::kRows);
      while (left != 0) {
        const int lane = lowest_bit(left), row = shuffle_from(code, lane);
        left &= left - 1;
        float* to = array + head.index_of_key(from + lane) * p.value_dim + first_value;
        for (int column = this->lane; column < columns; column += 32) {
          to[column] = this->stage(row)[column];
        }
      }
    }
    __syncthreads();
  }

  LONGVQ_DEVICE void run() {
    const Piece piece = piece_of(p, g.code_segment, blockIdx.z / p.batch, blockIdx.z % p.batch);
    if (!piece.exists(g.code_segment)) {
      return;
    }
    head.enter(piece.sequence);
    first = static_cast<int>(blockIdx.x) * Base::kRows;
    fill_packed<kThreads>(
        this->keys(), head.template codewords<Operand::kTerms, HEAD_DIM>(), padded_codes(p.codebook.num_codes),
        [&](int row) { return first + row < p.codebook.num_codes ? first + row : -1; });
    const int64_t begin = piece.index * g.code_segment, end = min(begin + g.code_segment, int64_t{head.length});
    const int64_t segment = (head.batch * p.kv_heads + head.kv_head) * p.num_pieces(g.code_segment) +
                            piece.sequence.first_piece(p, g.code_segment) + piece.index;
    // Keys before their queries, then keys after them. A single loop: with two, both with products, registers spill.
    for (bool keys_after = false;; keys_after = true) {
      const int64_t least = p.all_far() ? 0 : max(begin / kFarBlock, int64_t{p.options.causal && !keys_after});
      const int64_t fields = p.all_far() ? 1 : divide_up(end, kFarBlock);
      for (int64_t i = least; i < fields; ++i) {
        const int64_t field = keys_after ? i : least + fields - 1 - i;
        run_far_field(field, begin, end, keys_after);
      }
      if (!keys_after) {
        write_sums(segment);
      }
      if (keys_after || OUTPUTS == kKeysOnly || g.dv_far_after == nullptr) {
        return;
      }
      Base::clear(dvalues);
    }
  }

  // Adds the gradients from the queries of one far field (all far: from queries begin .. end), and writes the value
  // gradients of the keys that are in this far field but not in the next one to visit.
  LONGVQ_DEVICE void run_far_field(int64_t field, int64_t begin, int64_t end, bool keys_after) {
    const int64_t length = head.length;
    if (!p.all_far()) {
      begin = field * kFarBlock, end = min(begin + kFarBlock, length);
    }
    accumulate(begin, end, !keys_after);
    int64_t from = 0, to = g.dcode_values == nullptr ? length : 0;
    if (keys_after) {
      from = near_end(field), to = end < length ? near_end(field + 1) : length;
    } else if (!p.all_far()) {
      from = field > 0 ? near_begin(field - 1) : 0, to = near_begin(field);
    }
    scatter_to_keys(keys_after ? g.dv_far_after : g.dv_far_before, from, to);
  }

  // Writes the sums over the whole segment.
  LONGVQ_DEVICE void write_sums(int64_t segment) const {
    const auto row_of_array = [&](float* array, int row, int64_t columns) {
      return first + row < p.codebook.num_codes ? array + (segment * p.codebook.num_codes + first + row) * columns
                                                : nullptr;
    };
    if (OUTPUTS != kValuesOnly) {
      this->write(dkeys, p.far_head_dim, [&](int row) { return row_of_array(g.dcodewords, row, p.far_head_dim); });
    }
    if (OUTPUTS != kKeysOnly && g.dcode_values != nullptr) {
      this->write_values([&](int row) { return row_of_array(g.dcode_values, row, p.value_dim); });
    }
  }
};

template <typename Element, int HEAD_DIM, int VALUE_DIM, Outputs OUTPUTS>
__global__ void __launch_bounds__(kThreads, 2) differentiate_codes(AttentionGradients g, Alignment alignment) {
  CodeGradient<Element, HEAD_DIM, VALUE_DIM, OUTPUTS>(g, alignment).run();
}

}  // namespace
}  // namespace longvq::cuda
