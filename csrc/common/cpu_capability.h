// Chooses the instruction set whose kernels this process uses, among those that the library was compiled for.
#pragma once

namespace longvq {

enum class CpuCapability { kDefault = 0, kAvx2 = 1, kAvx512 = 2 };

// The best instruction set of this CPU, or the one that the environment variable LONGVQ_CPU_CAPABILITY names (default |
// avx2 | avx512). The variable is read once, when the library is loaded. If this CPU or this build does not have that
// instruction set, the result is kDefault, and cpu_capability_error() returns the reason.
CpuCapability cpu_capability();

// The reason why LONGVQ_CPU_CAPABILITY was refused, or nullptr.
const char* cpu_capability_error();

const char* cpu_capability_name(CpuCapability capability);

}  // namespace longvq

#ifdef LONGVQ_HAVE_AVX512
#define LONGVQ_IF_AVX512(x) x
#else
#define LONGVQ_IF_AVX512(x)
#endif
#ifdef LONGVQ_HAVE_AVX2
#define LONGVQ_IF_AVX2(x) x
#else
#define LONGVQ_IF_AVX2(x)
#endif

// Defines kernel_of_this_cpu(), which returns NAME_default, NAME_avx2 or NAME_avx512, objects of type TYPE.
#define LONGVQ_DEFINE_KERNEL_OF_THIS_CPU(TYPE, NAME)                        \
  const TYPE& kernel_of_this_cpu() {                                        \
    switch (cpu_capability()) {                                             \
      LONGVQ_IF_AVX512(case CpuCapability::kAvx512 : return NAME##_avx512;) \
      LONGVQ_IF_AVX2(case CpuCapability::kAvx2 : return NAME##_avx2;)       \
      default:                                                              \
        return NAME##_default;                                              \
    }                                                                       \
  }
