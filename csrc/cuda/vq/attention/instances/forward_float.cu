#include "../forward.h"

namespace longvq::cuda {

int attention_float(const Attention& problem, void* stream) {
  return attend_as<float>(problem, stream);
}

}  // namespace longvq::cuda
