// Pieces of sequences: what a block of threads takes of a row of the batch or of a document, see Sequences.
//
// Pieces of document n begin at number n + ⌊offsets[n] / unit⌋. Since ⌈(b − a) / unit⌉ ≤ ⌊b / unit⌋ − ⌊a / unit⌋ + 1,
// each has as many as it needs before the next one's, and no sum over the documents before is needed to find them.
#pragma once

#include "device.h"
#include "params.h"

namespace longvq::cuda {

struct Sequence {
  int64_t number, batch;  // among all sequences, and the row of the tensors it is in
  int64_t start, length;  // there

  // The number of its first piece in its row.
  LONGVQ_DEVICE int64_t first_piece(const Sequences& s, int64_t unit) const {
    return s.offsets == nullptr ? 0 : number + start / unit;
  }
};

// The number of its first far field in its row, of which a causal one has none for its first block of queries.
LONGVQ_DEVICE int64_t first_far_field(const Sequences& s, const Sequence& of, bool causal, bool all_far) {
  if (all_far) {
    return s.offsets == nullptr ? 0 : of.number;
  }
  return causal ? of.start / kFarBlock - 1 : of.first_piece(s, kFarBlock);
}

LONGVQ_DEVICE int64_t start_of(const Sequences& s, int64_t document) {
  // Offsets that a caller made up must not become addresses.
  return min(max(static_cast<int64_t>(s.offsets[document]), int64_t{0}), s.length);
}

LONGVQ_DEVICE Sequence sequence_of(const Sequences& s, int64_t number) {
  if (s.offsets == nullptr) {
    return {number, number, 0, s.length};
  }
  const int64_t start = start_of(s, number);
  return {number, 0, start, max(start_of(s, number + 1) - start, int64_t{0})};
}

// The last document that begins at or before piece `number`: of a unit of 0, before that position.
LONGVQ_DEVICE int64_t find_document(const Sequences& s, int64_t unit, int64_t number) {
  int64_t low = 0, high = s.documents;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2, start = start_of(s, middle);
    (unit == 0 ? start <= number : middle + start / unit <= number) ? low = middle : high = middle;
  }
  return low;
}

struct Piece {
  Sequence of;
  int64_t index;  // in its sequence

  // Of an empty sequence there is the first piece, which is empty.
  LONGVQ_DEVICE bool there(int64_t unit) const { return index == 0 || index * unit < of.length; }
};

// Piece `number` of a row of the tensors.
LONGVQ_DEVICE Piece piece_of(const Sequences& s, int64_t unit, int64_t number, int64_t batch) {
  if (s.offsets == nullptr) {
    return {sequence_of(s, batch), number};
  }
  const Sequence of = sequence_of(s, find_document(s, unit, number));
  return {of, max(number - of.first_piece(s, unit), int64_t{0})};
}

// The sequence that a position of a row of the tensors is in.
LONGVQ_DEVICE Sequence sequence_at(const Sequences& s, int64_t position, int64_t batch) {
  return sequence_of(s, s.offsets == nullptr ? batch : find_document(s, 0, position));
}

}  // namespace longvq::cuda
