// Far fields: running sums of values by code, stored once for every kFarBlock queries.
//
// A block of threads walks along the keys of one head for 32 columns of values and up to 512 codes. It keeps their sums
// in shared memory in float32. A warp owns every eighth code and a lane owns one column, so each sum has one owner that
// adds in the order of the keys: no atomics, and the same result every time. A long sequence is cut into segments,
// which run at the same time; earlier kernels make the sums that each segment starts from.
#include <initializer_list>

#include "code_sums.h"

namespace longvq::cuda {
namespace {

constexpr int kBlocks = 3;  // on a multiprocessor: as many as the shared memory of Hopper holds

// The sums of each segment by itself.
template <typename Element>
__global__ void __launch_bounds__(kThreads, kBlocks) sum_segments(FarField p, bool backward) {
  const auto rows = static_cast<unsigned>(p.batch);
  const Piece piece = piece_of(p, kSegment, blockIdx.z / rows, blockIdx.z % rows);
  const int64_t segment = piece.index, next = segment + 1;
  // No segment follows the last one, so its sums are not needed unless all keys are far.
  const bool needed = p.all_far() || next * kSegment < piece.sequence.length;
  if (!piece.exists(kSegment) || !needed) {
    return;
  }
  const CodeSums<Element> sums(p, piece.sequence);
  const Walk walk{p, piece.sequence.length, backward};
  sums.clear();
  sums.add_keys(walk, walk.begin(segment), walk.begin(next));
  sums.write(p.segment_sums, p.segment_counts, sums.segment_index(segment));
}

template <typename T>
LONGVQ_DEVICE void accumulate(T* sums, int64_t pitch, int64_t count) {
  T sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += sums[i * pitch];
    sums[i * pitch] = sum;
  }
}

// Replaces the sums of each segment by the sums of all segments up to it, which the next segment starts from. One
// thread for each column of a code, and one for its count.
__global__ void __launch_bounds__(kThreads) accumulate_segments(FarField p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, columns = p.value_dim + 1;
  const int64_t column = i % columns, code = i / columns % p.num_codes, head = i / columns / p.num_codes % p.kv_heads;
  const int64_t number = i / columns / p.num_codes / p.kv_heads;
  if (number >= p.num_sequences()) {
    return;
  }
  const Sequence sequence = sequence_of(p, number);
  const int64_t count = divide_up(sequence.length, kSegment) - 1;  // without the last segment
  const int64_t first =
      ((sequence.batch * p.kv_heads + head) * p.num_segments() + first_segment(p, sequence)) * p.num_codes + code;
  if (column < p.value_dim) {
    accumulate(p.segment_sums + first * p.value_dim + column, p.num_codes * p.value_dim, count);
  } else {
    accumulate(p.segment_counts + first, p.num_codes, count);
  }
}

// What a walk writes: sums for the backward walk, means, or means that add the sums of the forward walk.
enum class WalkResult { kSums, kMeans, kMeansOfBoth };

// Starts from the sums of all earlier segments, and writes the far fields of one segment.
template <typename Element>
__global__ void __launch_bounds__(kThreads, kBlocks) make_far_fields(FarField p, bool backward, WalkResult result) {
  const auto rows = static_cast<unsigned>(p.batch);
  const Piece piece = piece_of(p, kSegment, blockIdx.z / rows, blockIdx.z % rows);
  if (!piece.exists(kSegment)) {
    return;
  }
  const CodeSums<Element> sums(p, piece.sequence);
  const Walk walk{p, piece.sequence.length, backward};
  const int64_t segment = piece.index;
  sums.clear();
  if (segment > 0) {
    sums.add_segment(segment - 1);  // includes all segments before
  }
  const int64_t first = segment * kFarSegment, last = min(first + kFarSegment, walk.num_fields());
  for (int64_t index = first; index < last; ++index) {
    if (index > first) {
      sums.add_keys(walk, walk.limit(index - 1), walk.limit(index));
    }
    const int64_t field = walk.field(index);
    if (p.causal && field == 0) {
      continue;
    }
    if (result == WalkResult::kSums) {
      sums.write(p.before_sums, p.before_counts, sums.field_index(field));
    } else {
      sums.write_means(field, result == WalkResult::kMeansOfBoth);
    }
  }
}

// One far field for each sequence, with all of its keys.
template <typename Element>
__global__ void __launch_bounds__(kThreads, kBlocks) make_single_far_field(FarField p) {
  const Sequence sequence = sequence_of(p, blockIdx.z);
  const CodeSums<Element> sums(p, sequence);
  sums.clear();
  for (int64_t segment = 0; segment * kSegment < sequence.length; ++segment) {
    sums.add_segment(segment);
  }
  sums.write_means(0, false);
}

template <typename Element>
int launch_all(const FarField& p, void* stream) {
  const auto columns = static_cast<unsigned>(divide_up(p.value_dim, kColumns) * divide_up(p.num_codes, kCodes));
  const dim3 grid(columns, static_cast<unsigned>(p.kv_heads), static_cast<unsigned>(p.num_pieces(kSegment) * p.batch));
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
      const dim3 sequences(columns, grid.y, static_cast<unsigned>(p.num_sequences()));
      return launch<make_single_far_field<Element>>(sequences, kThreads, kBytes, stream, p);
    }
    if (several) {
      const int64_t threads = p.num_sequences() * p.kv_heads * p.num_codes * (p.value_dim + 1);
      const dim3 all(static_cast<unsigned>(divide_up(threads, kThreads)));
      if (const int error = launch<accumulate_segments>(all, kThreads, 0, stream, p)) {
        return error;
      }
    }
    const WalkResult result = !both ? WalkResult::kMeans : backward ? WalkResult::kMeansOfBoth : WalkResult::kSums;
    if (const int error = launch<make_far_fields<Element>>(grid, kThreads, kBytes, stream, p, backward, result)) {
      return error;
    }
  }
  return 0;
}

}  // namespace

int longvq_cuda_far_field(const FarField* problem, void* stream) {
  const FarField& p = *problem;
  if (p.batch == 0 || p.kv_heads == 0 || p.length == 0 || p.value_dim == 0) {
    return 0;
  }
  if (p.kv_heads > kMaxGrid || p.batch * p.num_pieces(kSegment) > kMaxGrid || p.num_sequences() > kMaxGrid) {
    return kUnsupported;
  }
  return for_dtype(p.type, [&](auto element) { return launch_all<decltype(element)>(p, stream); });
}

}  // namespace longvq::cuda
