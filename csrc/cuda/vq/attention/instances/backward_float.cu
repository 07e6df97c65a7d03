#include "../backward.h"

namespace longvq::cuda {

int attention_gradients_float(const AttentionGradients& problem, void* stream) {
  return differentiate_as<float>(problem, stream);
}

}  // namespace longvq::cuda
