// Registers the CUDA kernels for the operators that longvq_layers/ops/_schema.py defines. The build for the host, for
// tests, registers them for operators with the same schemas in the namespace longvq_on_host.
#include <torch/csrc/stable/library.h>

#include "../common/export.h"
#include "operators.h"

#ifdef LONGVQ_ON_HOST
STABLE_TORCH_LIBRARY_IMPL(longvq_on_host, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(longvq, CUDA, m) {
#endif
  m.impl("vq_assign", TORCH_BOX(&longvq::cuda::vq_assign));
  m.impl("vq_attention", TORCH_BOX(&longvq::vq_attention_operator<&longvq::cuda::vq_attention>));
  m.impl(
      "vq_attention_backward",
      TORCH_BOX(&longvq::vq_attention_backward_operator<&longvq::cuda::vq_attention_backward>));
  m.impl("ssm_scan", TORCH_BOX(&longvq::cuda::ssm_scan));
  m.impl("ssm_scan_backward", TORCH_BOX(&longvq::cuda::ssm_scan_backward));
}

LONGVQ_EXPORT const char* longvq_cuda_operators() {
  return "vq_assign vq_attention vq_attention_backward ssm_scan ssm_scan_backward";
}
