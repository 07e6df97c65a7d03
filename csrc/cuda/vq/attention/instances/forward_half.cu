#include "../forward.h"

namespace longvq::cuda {

int attention_half(const Attention& problem, void* stream) {
  return attend_as<Half>(problem, stream);
}

}  // namespace longvq::cuda
