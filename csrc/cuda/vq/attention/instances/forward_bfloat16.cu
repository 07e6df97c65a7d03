#include "../forward.h"

namespace longvq::cuda {

int attention_bfloat16(const Attention& problem, void* stream) {
  return attend_as<BFloat16>(problem, stream);
}

}  // namespace longvq::cuda
