// Sequences, and the pieces that blocks of threads work on: `unit` consecutive positions of one sequence.
//
// The pieces in a row of the tensors are numbered. Those of document n begin at number n + ⌊offsets[n] / unit⌋. Since
// ⌈(b − a) / unit⌉ ≤ ⌊b / unit⌋ − ⌊a / unit⌋ + 1, every document has enough numbers before the next one begins, and a
// block finds its document without a sum over the documents before. Some numbers have no piece.
#pragma once

#include "device.h"
#include "sequences.h"

namespace longvq::cuda {

struct Sequence {
  int64_t number;         // among all sequences
  int64_t batch;          // the row of the tensors that it is in
  int64_t start, length;  // in that row

  // The number of its first piece in that row.
  LONGVQ_DEVICE int64_t first_piece(const Sequences& s, int64_t unit) const {
    return s.offsets == nullptr ? 0 : number + start / unit;
  }
};

LONGVQ_DEVICE int64_t start_of(const Sequences& s, int64_t document) {
  // The values of the offsets are not checked before the launch, so a wrong offset must not become an address.
  return min(max(static_cast<int64_t>(s.offsets[document]), int64_t{0}), s.length);
}

LONGVQ_DEVICE Sequence sequence_of(const Sequences& s, int64_t number) {
  if (s.offsets == nullptr) {
    return {number, number, 0, s.length};
  }
  const int64_t start = start_of(s, number);
  return {number, 0, start, max(start_of(s, number + 1) - start, int64_t{0})};
}

// The last document that begins at or before piece `number`. With a unit of 0: at or before position `number`.
LONGVQ_DEVICE int64_t find_document(const Sequences& s, int64_t unit, int64_t number) {
  int64_t low = 0, high = s.documents;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2, start = start_of(s, middle);
    (unit == 0 ? start <= number : middle + start / unit <= number) ? low = middle : high = middle;
  }
  return low;
}

struct Piece {
  Sequence sequence;
  int64_t index;  // in its sequence

  // An empty sequence has one piece, which is empty.
  LONGVQ_DEVICE bool exists(int64_t unit) const { return index == 0 || index * unit < sequence.length; }
};

// Piece `number` of a row of the tensors.
LONGVQ_DEVICE Piece piece_of(const Sequences& s, int64_t unit, int64_t number, int64_t batch) {
  if (s.offsets == nullptr) {
    return {sequence_of(s, batch), number};
  }
  const Sequence sequence = sequence_of(s, find_document(s, unit, number));
  return {sequence, max(number - sequence.first_piece(s, unit), int64_t{0})};
}

// The sequence of a position in a row of the tensors.
LONGVQ_DEVICE Sequence sequence_at(const Sequences& s, int64_t position, int64_t batch) {
  return sequence_of(s, s.offsets == nullptr ? batch : find_document(s, 0, position));
}

}  // namespace longvq::cuda
