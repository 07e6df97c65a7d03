// The attention's forward, compiled in files of their own for each type.
#include "../../common/dispatch.h"

namespace longvq::cuda {

int attention_float(const Attention& problem, void* stream);
int attention_bfloat16(const Attention& problem, void* stream);
int attention_half(const Attention& problem, void* stream);

int longvq_cuda_attention(const Attention* problem, void* stream) {
  const Attention& p = *problem;
  if (p.batch == 0 || p.heads == 0 || p.length == 0 || p.values == 0) {
    return 0;
  }
  if (p.length > (int64_t{1} << 30) || p.batch > kMaxGrid ||
      p.heads * p.values > kMaxGrid) {  // more than slices of values, and simpler
    return kNotCovered;
  }
  switch (p.type) {
    case ElementType::kFloat:
      return attention_float(p, stream);
    case ElementType::kBFloat16:
      return attention_bfloat16(p, stream);
    case ElementType::kHalf:
      return attention_half(p, stream);
  }
  return kNotCovered;
}

}  // namespace longvq::cuda
