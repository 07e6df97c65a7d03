// The launcher of attention's forward, whose kernels are compiled in instances/.
#include "../../common/dispatch.h"
#include "../params.h"

namespace longvq::cuda {

int attention_float(const Attention& problem, void* stream);
int attention_bfloat16(const Attention& problem, void* stream);
int attention_half(const Attention& problem, void* stream);

int longvq_cuda_attention(const Attention* problem, void* stream) {
  const Attention& p = *problem;
  if (p.batch == 0 || p.heads == 0 || p.length == 0 || p.value_dim == 0) {
    return 0;
  }
  // The grid has a row for each head and slice of values; heads · value_dim is a simple upper bound of these.
  if (p.length > (int64_t{1} << 30) || p.batch > kMaxGrid || p.heads * p.value_dim > kMaxGrid) {
    return kUnsupported;
  }
  switch (p.type) {
    case ElementType::kFloat:
      return attention_float(p, stream);
    case ElementType::kBFloat16:
      return attention_bfloat16(p, stream);
    case ElementType::kHalf:
      return attention_half(p, stream);
  }
  return kUnsupported;
}

}  // namespace longvq::cuda
