// Running sums of values by code, from which far_field.cu makes far fields.
#pragma once

#include "../common/dispatch.h"
#include "far_index.h"

namespace longvq::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kColumns = 32;  // columns of values of a block, one for each lane
constexpr int kCodes = 512;   // codes of a block
constexpr int kKeys = 128;    // keys whose codes are in shared memory at a time
constexpr int64_t kSegment = kFarBlock * kFarSegment;
constexpr size_t kBytes = sizeof(float) * kCodes * kColumns + sizeof(int) * (kCodes + kKeys);

// The index of a sequence's first segment among the segments of its row.
LONGVQ_DEVICE int64_t first_segment(const FarField& p, const Sequence& sequence) {
  return p.all_far() ? sequence.first_piece(p, kSegment) : sequence.start / kSegment;
}

// The order in which a block visits the keys and far fields of a sequence: from the first, or backward from the last.
// Keys are counted in steps, far fields by `index`, both from the start of the walk.
struct Walk {
  const FarField& p;
  int64_t length;
  bool backward;

  LONGVQ_DEVICE int64_t key(int64_t step) const { return backward ? length - 1 - step : step; }
  LONGVQ_DEVICE int64_t num_fields() const { return divide_up(length, kFarBlock); }
  LONGVQ_DEVICE int64_t field(int64_t index) const { return backward ? num_fields() - 1 - index : index; }
  // The number of steps whose keys are in far field `index`.
  LONGVQ_DEVICE int64_t limit(int64_t index) const {
    const int64_t reach = max(p.window, int64_t{1});
    const int64_t first = field(index) * kFarBlock;
    const int64_t limit = backward ? length - (first + kFarBlock - 1 + reach) : first - reach + 1;
    return min(max(limit, int64_t{0}), length);
  }
  // The first step of a segment.
  LONGVQ_DEVICE int64_t begin(int64_t segment) const {
    const int64_t index = segment * kFarSegment;
    if (index * kFarBlock >= length) {
      return length;
    }
    return p.all_far() ? index * kFarBlock : limit(index);
  }
};

// The running sums of a block of threads, in shared memory: values and counts of up to kCodes codes, kColumns columns.
template <typename Element>
struct CodeSums {
  const FarField& p;
  Sequence sequence;
  int64_t head, first_code, first_column;
  float* sums;         // (kCodes, kColumns)
  int* counts;         // (kCodes,)
  int* codes_of_keys;  // (kKeys,), counted from first_code; −1: the key is ignored, or its code is in another block

  LONGVQ_DEVICE CodeSums(const FarField& problem, const Sequence& sequence) : p(problem), sequence(sequence) {
    const auto slices = static_cast<unsigned>(divide_up(p.value_dim, kColumns));
    first_column = blockIdx.x % slices * kColumns;
    first_code = blockIdx.x / slices * kCodes;
    head = blockIdx.y;
    sums = reinterpret_cast<float*>(shared_memory());
    counts = reinterpret_cast<int*>(sums + kCodes * kColumns);
    codes_of_keys = counts + kCodes;
  }

  LONGVQ_DEVICE int64_t column() const { return first_column + threadIdx.x % 32; }
  LONGVQ_DEVICE bool has_column() const { return column() < p.value_dim; }

  // Calls call(code, sum) for every code of this warp: the code counts from first_code, `sum` points to this lane's
  // column.
  template <typename Call>
  LONGVQ_DEVICE void each_code(const Call& call) const {
    for (int code = threadIdx.x / 32; code < min(p.num_codes - first_code, int64_t{kCodes}); code += kWarps) {
      call(code, sums + code * kColumns + threadIdx.x % 32);
    }
  }

  LONGVQ_DEVICE void clear() const {
    each_code([&](int code, float* sum) {
      *sum = 0;
      counts[code] = 0;
    });
    __syncthreads();
  }

  // Indices of a segment and of a far field of this sequence in the arrays of the problem.
  LONGVQ_DEVICE int64_t segment_index(int64_t segment) const {
    return (sequence.batch * p.kv_heads + head) * p.num_segments() + first_segment(p, sequence) + segment;
  }
  LONGVQ_DEVICE int64_t field_index(int64_t field) const {
    return (sequence.batch * p.kv_heads + head) * p.num_far_fields() +
           first_far_field(p, sequence, p.causal, p.all_far()) + field;
  }

  // The offsets of a code's count and of this lane's column of its sum, in arrays of segments or far fields.
  LONGVQ_DEVICE int64_t count_offset(int64_t index, int code) const { return index * p.num_codes + first_code + code; }
  LONGVQ_DEVICE int64_t sum_offset(int64_t index, int code) const {
    return count_offset(index, code) * p.value_dim + column();
  }

  LONGVQ_DEVICE void add_segment(int64_t segment) const {
    const int64_t index = segment_index(segment);
    each_code([&](int code, float* sum) {
      if (has_column()) {
        *sum += p.segment_sums[sum_offset(index, code)];
      }
      if (threadIdx.x % 32 == 0) {
        counts[code] += p.segment_counts[count_offset(index, code)];
      }
    });
    __syncthreads();
  }

  LONGVQ_DEVICE void write(float* to_sums, int32_t* to_counts, int64_t index) const {
    each_code([&](int code, float* sum) {
      if (has_column()) {
        to_sums[sum_offset(index, code)] = *sum;
      }
      if (first_column == 0 && threadIdx.x % 32 == 0) {
        to_counts[count_offset(index, code)] = counts[code];
      }
    });
  }

  // Writes means and counts. `add_before`: adds what the forward walk left in before_sums and before_counts.
  LONGVQ_DEVICE void write_means(int64_t field, bool add_before) const {
    const int64_t index = field_index(field), padded = padded_codes(p.num_codes), pitch = padded_value_dim(p.value_dim);
    each_code([&](int code, const float* sum) {
      float total = *sum;
      int count = counts[code];
      if (add_before) {
        total += has_column() ? p.before_sums[sum_offset(index, code)] : 0.0f;
        count += p.before_counts[count_offset(index, code)];
      }
      const int64_t row = index * padded + first_code + code;
      if (column() < pitch) {
        Element* mean = static_cast<Element*>(p.means) + row * pitch + column();
        store(mean, count > 0 && has_column() ? total / static_cast<float>(count) : 0.0f);
      }
      if (first_column == 0 && threadIdx.x % 32 == 0) {
        p.counts[row] = p.log_counts ? logf(static_cast<float>(count)) : static_cast<float>(count);
      }
    });
  }

  // Goes through 32 keys from `begin` in order, and adds the keys whose codes belong to this warp. Loads kInFlight
  // values at a time.
  template <typename ValueOf>
  LONGVQ_DEVICE void add_keys_of_warp(int begin, int count, const ValueOf& value_of) const {
    constexpr int kInFlight = 4;
    const int mine = begin + static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int own = mine < count ? codes_of_keys[mine] : -1;
    uint32_t left = ballot(own >= 0 && own % kWarps == warp);
    while (left != 0) {
      int keys[kInFlight];
      float values[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        keys[i] = left != 0 ? begin + lowest_bit(left) : -1;
        left &= left - 1;
        values[i] = keys[i] >= 0 && has_column() ? value_of(keys[i]) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (keys[i] >= 0) {
          const int code = codes_of_keys[keys[i]];
          sums[code * kColumns + threadIdx.x % 32] += values[i];
          if (threadIdx.x % 32 == 0) {
            ++counts[code];
          }
        }
      }
    }
  }

  // Adds the keys of steps begin .. end of a walk.
  LONGVQ_DEVICE void add_keys(const Walk& walk, int64_t begin, int64_t end) const {
    const int64_t* codes = p.codes + (sequence.batch * p.kv_heads + head) * p.length + sequence.start;
    const Element* values = static_cast<const Element*>(p.v) + sequence.batch * p.v_strides.batch +
                            head * p.v_strides.head + sequence.start * p.v_strides.length + column();
    for (int64_t first = begin; first < end; first += kKeys) {
      const int count = static_cast<int>(min(end - first, int64_t{kKeys}));
      __syncthreads();
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const int64_t key = walk.key(first + i), code = codes[key] - first_code;
        const bool ignored = p.mask.ignores(sequence.batch, sequence.start + key);
        codes_of_keys[i] = !ignored && code >= 0 && code < kCodes ? static_cast<int>(code) : -1;
      }
      __syncthreads();
      for (int i = 0; i < count; i += 32) {
        add_keys_of_warp(
            i, count, [&](int key) { return to_float(values[walk.key(first + key) * p.v_strides.length]); });
      }
    }
    __syncthreads();
  }
};

}  // namespace
}  // namespace longvq::cuda
