// Keys and codebook of a call of vq_assign as they are in memory. For files that are compiled once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../../common/aligned_array.h"
#include "../../common/convert.h"

namespace longvq {

constexpr int64_t kMinFlopsPerThread = 1 << 20;  // below this, starting a thread costs more than it saves

struct AssignShape {
  int64_t batch, heads, length, head_dim, codes;

  int64_t rows() const { return batch * length; }  // keys of one head
};

// Strides in elements.
struct AssignCodebook {
  const float* data;
  int64_t head_stride, code_stride, dim_stride;
};

struct AssignKeys {
  const void* data;
  ElementType type;
  int64_t batch_stride, head_stride, length_stride, dim_stride;

  // Loads row `row` of a head, counted over batch and length, as float32. Returns whether all its entries are finite.
  bool load(const AssignShape& shape, int64_t head, int64_t row, float* out) const {
    const int64_t offset = row / shape.length * batch_stride + head * head_stride + row % shape.length * length_stride;
    load_row(element_at(data, type, offset), type, dim_stride, shape.head_dim, out);
    constexpr uint32_t kExponent = 0x7f800000u;
    uint32_t not_finite = 0;
    for (int64_t d = 0; d < shape.head_dim; ++d) {
      uint32_t bits;
      std::memcpy(&bits, out + d, sizeof bits);
      not_finite |= (bits & kExponent) == kExponent;
    }
    return not_finite == 0;
  }
};

// Stores the code of a row in codes (B, H, L). A key that is not finite has no nearest code and gets code 0, which
// always exists.
inline void set_code(int64_t* codes, const AssignShape& shape, int64_t head, int64_t row, bool finite, int32_t code) {
  const int64_t batch = row / shape.length, position = row % shape.length;
  codes[(batch * shape.heads + head) * shape.length + position] = finite ? code : 0;
}

}  // namespace longvq
