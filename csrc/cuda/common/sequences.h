// The sequences of a call: the rows of a batch, or documents packed into one row.
#pragma once

#include <cstdint>

namespace longvq::cuda {

struct Sequences {
  int64_t batch, length;   // sizes of the tensors; the batch is 1 if there are documents
  const int32_t* offsets;  // (documents + 1,): document n holds positions offsets[n] .. offsets[n + 1]. Null: none
  int64_t documents;

  constexpr int64_t num_sequences() const { return offsets == nullptr ? batch : documents; }
  // The pieces of `unit` positions in one row of the tensors. A piece never holds positions of two documents, so this
  // may be more than the row needs; see pieces.h.
  constexpr int64_t num_pieces(int64_t unit) const {
    return offsets == nullptr ? (length + unit - 1) / unit : length / unit + documents;
  }
};

// The positions that take no part in a call, as keys or as queries.
struct PaddingMask {
  const uint8_t* data;  // (batch, length), not 0: ignored. Null: no position is ignored
  int64_t batch_stride, length_stride;

  constexpr uint8_t at(int64_t row, int64_t position) const {
    return data == nullptr ? 0 : data[row * batch_stride + position * length_stride];
  }
  constexpr bool ignores(int64_t row, int64_t position) const { return at(row, position) != 0; }
};

}  // namespace longvq::cuda
