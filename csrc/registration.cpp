// Registers the CPU kernels for the operators that longvq_layers/ops/_schema.py defines.
#include <torch/csrc/stable/library.h>

#include "common/cpu_capability.h"
#include "common/export.h"
#include "ssm/scan/scan.h"
#include "ssm/step/step.h"
#include "vq/assign/assign.h"
#include "vq/attention/attention.h"
#include "vq/step/step.h"

STABLE_TORCH_LIBRARY_IMPL(longvq, CPU, m) {
  // If LONGVQ_CPU_CAPABILITY is refused, nothing is registered: Python reads the reason and uses the torch kernels.
  if (longvq::cpu_capability_error() != nullptr) {
    return;
  }
  m.impl("vq_assign", TORCH_BOX(&longvq::vq_assign_cpu));
  m.impl("vq_attention", TORCH_BOX(&longvq::vq_attention_operator<&longvq::vq_attention_cpu>));
  m.impl(
      "vq_attention_backward", TORCH_BOX(&longvq::vq_attention_backward_operator<&longvq::vq_attention_backward_cpu>));
  m.impl("vq_attention_step", TORCH_BOX(&longvq::vq_attention_step_cpu));
  m.impl("ssm_scan", TORCH_BOX(&longvq::ssm_scan_cpu));
  m.impl("ssm_scan_backward", TORCH_BOX(&longvq::ssm_scan_backward_cpu));
  m.impl("ssm_step", TORCH_BOX(&longvq::ssm_step_cpu));
}

// The operators with CPU kernels, separated by spaces. Python checks that each of them was registered.
LONGVQ_EXPORT const char* longvq_cpu_operators() {
  return "vq_assign vq_attention vq_attention_backward vq_attention_step ssm_scan ssm_scan_backward ssm_step";
}
