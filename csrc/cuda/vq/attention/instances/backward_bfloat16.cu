#include "../backward.h"

namespace longvq::cuda {

int attention_gradients_bfloat16(const AttentionGradients& problem, void* stream) {
  return differentiate_as<BFloat16>(problem, stream);
}

}  // namespace longvq::cuda
