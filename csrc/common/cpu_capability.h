// Which of the instruction sets that this library was compiled for serves in this process.
#pragma once

namespace longvq {

enum class CpuCapability { kDefault = 0, kAvx2 = 1, kAvx512 = 2 };

// The best instruction set of this CPU, or the one named by the environment variable LONGVQ_CPU_CAPABILITY
// (default | avx2 | avx512). Read once, when the library is loaded. If the override can't be honoured this is
// kDefault and cpu_capability_error() says why.
CpuCapability cpu_capability();

// Why the override was refused, or nullptr.
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

// Defines kernel_of_this_cpu(): the one of NAME_default, NAME_avx2 and NAME_avx512, each a TYPE, that serves.
#define LONGVQ_DEFINE_KERNEL_OF_THIS_CPU(TYPE, NAME)                        \
  const TYPE& kernel_of_this_cpu() {                                        \
    switch (cpu_capability()) {                                             \
      LONGVQ_IF_AVX512(case CpuCapability::kAvx512 : return NAME##_avx512;) \
      LONGVQ_IF_AVX2(case CpuCapability::kAvx2 : return NAME##_avx2;)       \
      default:                                                              \
        return NAME##_default;                                              \
    }                                                                       \
  }
