#include "../backward.h"

namespace longvq::cuda {

int attention_gradients_half(const AttentionGradients& problem, void* stream) {
  return differentiate_as<Half>(problem, stream);
}

}  // namespace longvq::cuda
