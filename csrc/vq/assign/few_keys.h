// Codes for a few keys per head, as in generation. Packing the codebook would take longer than reading it.
#pragma once

#include "few_keys_kernel.h"
#include "inputs.h"

namespace longvq {

// Takes at most kFewKeys rows per head.
void assign_few_keys(const AssignKeys& keys, const AssignCodebook& codebook, const AssignShape& shape, int64_t* codes);

}  // namespace longvq
