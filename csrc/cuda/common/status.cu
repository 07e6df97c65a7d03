#include "status.h"

#include "device.h"

namespace longvq::cuda {

const char* longvq_cuda_error_text(int error) {
  return error_text(error);
}

}  // namespace longvq::cuda
