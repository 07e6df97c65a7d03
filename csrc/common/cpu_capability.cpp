#include "cpu_capability.h"

#include <cstdlib>
#include <string>

#include "export.h"

namespace longvq {
namespace {

constexpr const char* kOverride = "LONGVQ_CPU_CAPABILITY";

CpuCapability best_of_this_cpu() {
#if defined(LONGVQ_HAVE_AVX2) || defined(LONGVQ_HAVE_AVX512)
  // A static initialiser must call this before __builtin_cpu_supports. The builtin also asks the operating system
  // whether it saves the wide registers.
  __builtin_cpu_init();
#endif
#ifdef LONGVQ_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return CpuCapability::kAvx512;
  }
#endif
#ifdef LONGVQ_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return CpuCapability::kAvx2;
  }
#endif
  return CpuCapability::kDefault;
}

struct Selection {
  CpuCapability capability = best_of_this_cpu();
  std::string error;

  Selection() {
    const char* word = std::getenv(kOverride);
    if (word == nullptr || *word == '\0') {
      return;
    }
    const CpuCapability best = capability;
    capability = CpuCapability::kDefault;
    const std::string asked = std::string(kOverride) + "=" + word;
    for (CpuCapability candidate : {CpuCapability::kDefault, CpuCapability::kAvx2, CpuCapability::kAvx512}) {
      if (std::string(word) != cpu_capability_name(candidate)) {
        continue;
      }
      if (candidate > best) {
        error = asked + " is not available: the best that this CPU and this build of longvq-layers both have is '" +
                cpu_capability_name(best) + "'";
      } else {
        capability = candidate;
      }
      return;
    }
    error = std::string(kOverride) + " must be one of default, avx2, avx512, got " + word;
  }
};

const Selection& selection() {
  static const Selection chosen;
  return chosen;
}

}  // namespace

CpuCapability cpu_capability() {
  return selection().capability;
}

const char* cpu_capability_error() {
  const std::string& error = selection().error;
  return error.empty() ? nullptr : error.c_str();
}

const char* cpu_capability_name(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::kAvx512:
      return "avx512";
    case CpuCapability::kAvx2:
      return "avx2";
    case CpuCapability::kDefault:
      break;
  }
  return "default";
}

}  // namespace longvq

// Read by longvq_layers/_extension.py through ctypes. The strings live as long as the library.
LONGVQ_EXPORT const char* longvq_cpu_capability() {
  return longvq::cpu_capability_name(longvq::cpu_capability());
}

LONGVQ_EXPORT const char* longvq_cpu_capability_error() {
  return longvq::cpu_capability_error();
}
