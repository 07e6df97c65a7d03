// Where the far fields of a sequence begin, among all far fields of its row of the tensors.
#pragma once

#include "../common/pieces.h"
#include "params.h"

namespace longvq::cuda {

// The index of a sequence's first far field. The first block of a causal sequence has no far field, hence the −1: the
// far field of block n is first_far_field + n.
LONGVQ_DEVICE int64_t first_far_field(const Sequences& s, const Sequence& sequence, bool causal, bool all_far) {
  if (all_far) {
    return s.offsets == nullptr ? 0 : sequence.number;
  }
  return causal ? sequence.start / kFarBlock - 1 : sequence.first_piece(s, kFarBlock);
}

}  // namespace longvq::cuda
