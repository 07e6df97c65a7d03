// Kernels that are wrong, for tests that the machine says so.
#include <exception>
#include <string>

#include "../../common/export.h"
#include "machine.h"

namespace longvq::cuda {
namespace {

alignas(16) const char kSource[16] = {};

struct TwoCopies {
  static void run() {  // by all threads
    copy_later(shared_memory(), kSource, 16);
    commit_copies();
  }
};

struct CopyAfterWaiting {
  static void run() {
    char* own = shared_memory() + 16 * threadIdx.x;
    for (int i = 0; i < 2; ++i) {
      copy_later(own, kSource, 16);
      commit_copies();
      wait_for_copies<0>();
    }
  }
};

struct CopyOutside {
  static void run() { copy_later(shared_memory() + 16 * (blockDim.x + threadIdx.x), kSource, 16); }
};

template <typename Kernel>
std::string said_of(unsigned blocks = 1) {
  constexpr unsigned kThreads = 32;
  try {
    on_host::run_grid(dim3(1, blocks), dim3(kThreads), 16 * kThreads, Kernel::run);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace
}  // namespace longvq::cuda

// What the machine says of the kernel of that name, nothing if it is right.
LONGVQ_EXPORT const char* longvq_on_host_said_of(const char* name) {
  using namespace longvq::cuda;
  static std::string said;
  const std::string kernel = name;
  said = kernel == "two copies to one place"      ? said_of<TwoCopies>()
         : kernel == "copies one after the other" ? said_of<CopyAfterWaiting>()
         : kernel == "copy outside"               ? said_of<CopyOutside>()
         : kernel == "no block"                   ? said_of<CopyAfterWaiting>(0)
                                                  : "unknown";
  return said.c_str();
}
