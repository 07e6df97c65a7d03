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
