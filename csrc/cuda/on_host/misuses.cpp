// Wrong kernels: tests check that the host finds the errors in them.
#include <exception>
#include <string>

#include "../../common/export.h"
#include "machine.h"

namespace longvq::cuda {
namespace {

alignas(16) const char kSource[16] = {};

struct TwoCopies {
  static void run() {  // all threads copy to the same place
    copy_async(shared_memory(), kSource, 16);
    commit_copies();
  }
};

struct CopyAfterWaiting {
  static void run() {
    char* own = shared_memory() + 16 * threadIdx.x;
    for (int i = 0; i < 2; ++i) {
      copy_async(own, kSource, 16);
      commit_copies();
      wait_for_copies<0>();
    }
  }
};

struct CopyOutside {
  static void run() { copy_async(shared_memory() + 16 * (blockDim.x + threadIdx.x), kSource, 16); }
};

template <typename Kernel>
std::string error_of(unsigned blocks = 1) {
  constexpr unsigned kThreads = 32;
  try {
    on_host::run_grid(dim3(1, blocks), dim3(kThreads), 16 * kThreads, Kernel::run);
  } catch (const std::exception& exception) {
    return exception.what();
  }
  return "";
}

}  // namespace
}  // namespace longvq::cuda

// The error that the host finds in the kernel with this name; empty if there is none.
LONGVQ_EXPORT const char* longvq_on_host_error_of(const char* name) {
  using namespace longvq::cuda;
  static std::string error;
  const std::string kernel = name;
  error = kernel == "two copies to one place"      ? error_of<TwoCopies>()
          : kernel == "copies one after the other" ? error_of<CopyAfterWaiting>()
          : kernel == "copy outside"               ? error_of<CopyOutside>()
          : kernel == "no block"                   ? error_of<CopyAfterWaiting>(0)
                                                   : "unknown";
  return error.c_str();
}
