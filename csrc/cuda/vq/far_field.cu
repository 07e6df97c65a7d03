// Far fields: running sums of values by code, a snapshot for every kFarBlock queries.
//
// A block of threads walks along the keys of one head for 32 columns of values and up to 512 codes, whose sums lie in
// shared memory in float32. A warp owns every eighth code and a lane one column, so each sum has one owner that adds in
// the order of the keys: no atomics, the same result every time. So that a long sequence is not one long walk it is cut
// into segments, whose sums are made first.
#include <initializer_list>

#include "../common/dispatch.h"
#include "../common/pieces.h"

namespace longvq::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kColumns = 32, kCodes = 512, kKeys = 128;
constexpr int64_t kSegment = kFarBlock * kFarSegment;
constexpr int kBlocks = 3;  // of a multiprocessor: as many as the shared memory of Hopper holds
constexpr size_t kBytes = sizeof(float) * kCodes * kColumns + sizeof(int) * (kCodes + kKeys);

// The place of the first segment of a sequence among those of its row.
LONGVQ_DEVICE int64_t first_segment(const FarField& p, const Sequence& of) {
  return p.all_far() ? of.first_piece(p, kSegment) : of.start / kSegment;
}

// Positions and far fields of a sequence in the order of the walk: from the first, or from the last.
struct Walk {
  const FarField& p;
  int64_t length;
  bool backward;

  LONGVQ_DEVICE int64_t key(int64_t step) const { return backward ? length - 1 - step : step; }
  LONGVQ_DEVICE int64_t fields() const { return divide_up(length, kFarBlock); }
  LONGVQ_DEVICE int64_t field(int64_t index) const { return backward ? fields() - 1 - index : index; }
  // How many keys, from the start of the walk, are in the far field `index`.
  LONGVQ_DEVICE int64_t limit(int64_t index) const {
    const int64_t reach = max(p.window, int64_t{1});
    const int64_t first = field(index) * kFarBlock;
    const int64_t limit = backward ? length - (first + kFarBlock - 1 + reach) : first - reach + 1;
    return min(max(limit, int64_t{0}), length);
  }
  // Where segments begin.
  LONGVQ_DEVICE int64_t begin(int64_t segment) const {
    const int64_t index = segment * kFarSegment;
    if (index * kFarBlock >= length) {
      return length;
    }
    return p.all_far() ? index * kFarBlock : limit(index);
  }
};

// The sums in shared memory and what this thread has of them.
template <typename Element>
struct Sums {
  const FarField& p;
  Sequence of;
  int64_t head, first_code, first_column;
  float* sums;
  int* numbers;
  int* codes_of_keys;

  LONGVQ_DEVICE Sums(const FarField& problem, const Sequence& sequence) : p(problem), of(sequence) {
    const auto slices = static_cast<unsigned>(divide_up(p.values, kColumns));
    first_column = blockIdx.x % slices * kColumns;
    first_code = blockIdx.x / slices * kCodes;
    head = blockIdx.y;
    sums = reinterpret_cast<float*>(shared_memory());
    numbers = reinterpret_cast<int*>(sums + kCodes * kColumns);
    codes_of_keys = numbers + kCodes;
  }

  LONGVQ_DEVICE int64_t column() const { return first_column + threadIdx.x % 32; }
  LONGVQ_DEVICE bool has_column() const { return column() < p.values; }

  // call(code here, its place in `sums`) for every code of this warp.
  template <typename Call>
  LONGVQ_DEVICE void each_code(const Call& call) const {
    for (int code = threadIdx.x / 32; code < min(p.codes - first_code, int64_t{kCodes}); code += kWarps) {
      call(code, sums + code * kColumns + threadIdx.x % 32);
    }
  }

  LONGVQ_DEVICE void clear() const {
    each_code([&](int code, float* sum) {
      *sum = 0;
      numbers[code] = 0;  // by all lanes
    });
    __syncthreads();
  }

  // The places of segments and far fields of this sequence in arrays of all.
  LONGVQ_DEVICE int64_t segment_place(int64_t segment) const {
    return (of.batch * p.heads + head) * p.segments() + first_segment(p, of) + segment;
  }
  LONGVQ_DEVICE int64_t field_place(int64_t field) const {
    return (of.batch * p.heads + head) * p.far_fields() + first_far_field(p, of, p.causal, p.all_far()) + field;
  }

  // A sum of all (codes, values) from an array of such.
  LONGVQ_DEVICE int64_t place(int64_t array, int code) const {
    return (array * p.codes + first_code + code) * p.values + column();
  }

  LONGVQ_DEVICE void add_segment(int64_t segment) const {
    const int64_t array = segment_place(segment);
    each_code([&](int code, float* sum) {
      if (has_column()) {
        *sum += p.segment_sums[place(array, code)];
      }
      if (threadIdx.x % 32 == 0) {
        numbers[code] += p.segment_numbers[array * p.codes + first_code + code];
      }
    });
    __syncthreads();
  }

  LONGVQ_DEVICE void write(float* to_sums, int32_t* to_numbers, int64_t array) const {
    each_code([&](int code, float* sum) {
      if (has_column()) {
        to_sums[place(array, code)] = *sum;
      }
      if (first_column == 0 && threadIdx.x % 32 == 0) {
        to_numbers[array * p.codes + first_code + code] = numbers[code];
      }
    });
  }

  // Means, with what an earlier walk in the other direction found if there was one.
  LONGVQ_DEVICE void write_means(int64_t field, bool add_before) const {
    const int64_t array = field_place(field), padded = padded_codes(p.codes), pitch = value_pitch(p.values);
    each_code([&](int code, const float* sum) {
      float total = *sum;
      int number = numbers[code];
      if (add_before) {
        total += has_column() ? p.before_sums[place(array, code)] : 0.0f;
        number += p.before_numbers[array * p.codes + first_code + code];
      }
      const int64_t row = array * padded + first_code + code;
      if (column() < pitch) {
        Element* mean = static_cast<Element*>(p.means) + row * pitch + column();
        store(mean, number > 0 && has_column() ? total / static_cast<float>(number) : 0.0f);
      }
      if (first_column == 0 && threadIdx.x % 32 == 0) {
        p.numbers[row] = p.logarithm ? logf(static_cast<float>(number)) : static_cast<float>(number);
      }
    });
  }

  // Of 32 keys from `begin` those with codes of this warp, in their order; some values are on their way at the same
  // time.
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
            ++numbers[code];
          }
        }
      }
    }
  }

  // Adds the keys of steps begin .. end of the walk.
  LONGVQ_DEVICE void add_keys(const Walk& walk, int64_t begin, int64_t end) const {
    const int64_t* codes = p.code_of_key + (of.batch * p.heads + head) * p.length + of.start;
    const Element* values =
        static_cast<const Element*>(p.v) + of.batch * p.v_batch + head * p.v_head + of.start * p.v_length + column();
    for (int64_t first = begin; first < end; first += kKeys) {
      const int count = static_cast<int>(min(end - first, int64_t{kKeys}));
      __syncthreads();
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const int64_t key = walk.key(first + i), code = codes[key] - first_code;
        const bool ignored =
            p.ignored != nullptr && p.ignored[of.batch * p.ignored_batch + (of.start + key) * p.ignored_length] != 0;
        codes_of_keys[i] = !ignored && code >= 0 && code < kCodes ? static_cast<int>(code) : -1;
      }
      __syncthreads();
      for (int i = 0; i < count; i += 32) {
        add_keys_of_warp(i, count, [&](int key) { return to_float(values[walk.key(first + key) * p.v_length]); });
      }
    }
    __syncthreads();
  }
};

template <typename Element>
__global__ void __launch_bounds__(kThreads, kBlocks) sum_segments(FarField p, bool backward) {
  const auto rows = static_cast<unsigned>(p.batch);
  const Piece piece = piece_of(p, kSegment, blockIdx.z / rows, blockIdx.z % rows);
  const int64_t segment = piece.index, next = segment + 1;
  const bool needed = p.all_far() || next * kSegment < piece.of.length;  // otherwise that of the last segment is not
  if (!piece.there(kSegment) || !needed) {
    return;
  }
  const Sums<Element> sums(p, piece.of);
  const Walk walk{p, piece.of.length, backward};
  sums.clear();
  sums.add_keys(walk, walk.begin(segment), walk.begin(next));
  sums.write(p.segment_sums, p.segment_numbers, sums.segment_place(segment));
}

template <typename T>
LONGVQ_DEVICE void accumulate(T* sums, int64_t pitch, int64_t count) {
  T sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += sums[i * pitch];
    sums[i * pitch] = sum;
  }
}

// Sums of segments become those with all segments before, which enter the next one. A thread for a column of a code,
// and one for its number.
__global__ void __launch_bounds__(kThreads) accumulate_segments(FarField p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, columns = p.values + 1;
  const int64_t column = i % columns, code = i / columns % p.codes, head = i / columns / p.codes % p.heads;
  const int64_t number = i / columns / p.codes / p.heads;
  if (number >= p.sequences()) {
    return;
  }
  const Sequence of = sequence_of(p, number);
  const int64_t count = divide_up(of.length, kSegment) - 1;  // the last one enters no other, and has no place
  const int64_t first = ((of.batch * p.heads + head) * p.segments() + first_segment(p, of)) * p.codes + code;
  if (column < p.values) {
    accumulate(p.segment_sums + first * p.values + column, p.codes * p.values, count);
  } else {
    accumulate(p.segment_numbers + first, p.codes, count);
  }
}

// What a walk leaves: sums for the walk in the other direction, means, or means that add what such a walk left.
enum class Leaves { kSums, kMeans, kMeansOfBoth };

template <typename Element>
__global__ void __launch_bounds__(kThreads, kBlocks) make_far_fields(FarField p, bool backward, Leaves leaves) {
  const auto rows = static_cast<unsigned>(p.batch);
  const Piece piece = piece_of(p, kSegment, blockIdx.z / rows, blockIdx.z % rows);
  if (!piece.there(kSegment)) {
    return;
  }
  const Sums<Element> sums(p, piece.of);
  const Walk walk{p, piece.of.length, backward};
  const int64_t segment = piece.index;
  sums.clear();
  if (segment > 0) {
    sums.add_segment(segment - 1);  // with all before it
  }
  const int64_t first = segment * kFarSegment, last = min(first + kFarSegment, walk.fields());
  for (int64_t index = first; index < last; ++index) {
    if (index > first) {
      sums.add_keys(walk, walk.limit(index - 1), walk.limit(index));
    }
    const int64_t field = walk.field(index);
    if (p.causal && field == 0) {
      continue;
    }
    if (leaves == Leaves::kSums) {
      sums.write(p.before_sums, p.before_numbers, sums.field_place(field));
    } else {
      sums.write_means(field, leaves == Leaves::kMeansOfBoth);
    }
  }
}

// One far field for each sequence, of all its keys.
template <typename Element>
__global__ void __launch_bounds__(kThreads, kBlocks) make_only_far_field(FarField p) {
  const Sequence of = sequence_of(p, blockIdx.z);
  const Sums<Element> sums(p, of);
  sums.clear();
  for (int64_t segment = 0; segment * kSegment < of.length; ++segment) {
    sums.add_segment(segment);
  }
  sums.write_means(0, false);
}

template <typename Element>
int make(const FarField& p, void* stream) {
  const auto columns = static_cast<unsigned>(divide_up(p.values, kColumns) * divide_up(p.codes, kCodes));
  const dim3 grid(columns, static_cast<unsigned>(p.heads), static_cast<unsigned>(p.pieces(kSegment) * p.batch));
  const bool both = !p.causal && !p.all_far(), several = p.all_far() || p.length > kSegment;
  for (const bool backward : {false, true}) {
    if (backward && !both) {
      break;
    }
    if (several) {
      if (const int error = launch<sum_segments<Element>>(grid, kThreads, kBytes, stream, p, backward)) {
        return error;
      }
    }
    if (p.all_far()) {
      const dim3 sequences(columns, grid.y, static_cast<unsigned>(p.sequences()));
      return launch<make_only_far_field<Element>>(sequences, kThreads, kBytes, stream, p);
    }
    if (several) {
      const int64_t threads = p.sequences() * p.heads * p.codes * (p.values + 1);
      const dim3 all(static_cast<unsigned>(divide_up(threads, kThreads)));
      if (const int error = launch<accumulate_segments>(all, kThreads, 0, stream, p)) {
        return error;
      }
    }
    const Leaves leaves = !both ? Leaves::kMeans : backward ? Leaves::kMeansOfBoth : Leaves::kSums;
    if (const int error = launch<make_far_fields<Element>>(grid, kThreads, kBytes, stream, p, backward, leaves)) {
      return error;
    }
  }
  return 0;
}

}  // namespace

int longvq_cuda_far_field(const FarField* problem, void* stream) {
  const FarField& p = *problem;
  if (p.batch == 0 || p.heads == 0 || p.length == 0 || p.values == 0) {
    return 0;
  }
  if (p.heads > kMaxGrid || p.batch * p.pieces(kSegment) > kMaxGrid || p.sequences() > kMaxGrid) {
    return kNotCovered;
  }
  return for_element(p.type, [&](auto element) { return make<decltype(element)>(p, stream); });
}

}  // namespace longvq::cuda
