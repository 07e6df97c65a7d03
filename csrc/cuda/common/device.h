// The instructions that the kernels use: of a GPU, compiled by nvcc, or of the host, where tests run the same kernels
// thread by thread (any C++17 compiler; see on_host/block.h).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "status.h"

#ifdef __CUDACC__

#include <cuda_runtime.h>

#define LONGVQ_DEVICE __device__ __forceinline__

namespace longvq::cuda {

LONGVQ_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

LONGVQ_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

LONGVQ_DEVICE float shuffle_xor(float x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
// The value of the lane `by` below. The lowest `by` lanes get their own.
LONGVQ_DEVICE float shuffle_up(float x, int by) {
  return __shfl_up_sync(0xffffffffu, x, by);
}
LONGVQ_DEVICE float shuffle_from(float x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
LONGVQ_DEVICE int shuffle_from(int x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
LONGVQ_DEVICE int shuffle_xor(int x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

// Bit l of the result is the `x` of lane l.
LONGVQ_DEVICE uint32_t ballot(bool x) {
  return __ballot_sync(0xffffffffu, x);
}
// The index of the lowest bit that is set, −1 if none is.
LONGVQ_DEVICE int lowest_bit(uint32_t bits) {
  return __ffs(static_cast<int>(bits)) - 1;
}

LONGVQ_DEVICE void synchronize_warp() {
  __syncwarp();
}

// Optimisation barrier: the compiler assumes that x changed. It computes values derived from x again, instead of
// keeping them in registers.
LONGVQ_DEVICE void hide_from_optimizer(int& x) {
  asm volatile("" : "+r"(x));
}

// With a relative error of about 2^-22 (2 + |x|).
LONGVQ_DEVICE float fast_exponential(float x) {
  return __expf(x);
}

LONGVQ_DEVICE double cosine_of_pi(double x) {
  return cospi(x);
}
LONGVQ_DEVICE double sine_of_pi(double x) {
  return sinpi(x);
}

LONGVQ_DEVICE float from_bits(uint32_t bits) {
  return __uint_as_float(bits);
}
LONGVQ_DEVICE uint32_t to_bits(float x) {
  return __float_as_uint(x);
}

// Writes 16 bytes of global memory in one access; `to` must be a multiple of 16.
LONGVQ_DEVICE void store_16_bytes(void* to, const uint32_t (&x)[4]) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

// Copies `bytes` bytes from global to shared memory, asynchronously, and adds zeros up to 16 bytes.
LONGVQ_DEVICE void copy_async(void* target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source), "r"(bytes)
               : "memory");
}
// Puts the copies that this thread has started since the last call into a group.
LONGVQ_DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for all groups of this thread except the last NEWEST groups.
template <int NEWEST>
LONGVQ_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(NEWEST) : "memory");
}

// Loads four matrices of 8 × 8 16-bit numbers: lane l gives the address of row l % 8 of matrix l / 8.
LONGVQ_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
LONGVQ_DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a · b: a (16, 16), b (16, 8), c (16, 8).
LONGVQ_DEVICE void multiply_add_bfloat16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
LONGVQ_DEVICE void multiply_add_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounds two numbers to 16 bits; the first is in the low half of the result.
LONGVQ_DEVICE uint32_t round_to_bfloat16(float first, float second) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
  return out;
}
LONGVQ_DEVICE uint32_t round_to_half(float first, float second) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
  return out;
}
LONGVQ_DEVICE float half_to_float(uint16_t bits) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
  return out;
}

inline const char* error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Launches the kernel. Returns 0, an error of the CUDA runtime, or kUnsupported where it needs more shared memory than
// the GPU has.
template <auto KERNEL, typename... Arguments>
int launch(dim3 grid, int threads, size_t shared_bytes, void* stream, const Arguments&... arguments) {
  if (shared_bytes > 0) {
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error == cudaSuccess && shared_bytes > static_cast<size_t>(most)) {
      return kUnsupported;
    }
    if (error == cudaSuccess) {
      // This limit belongs to the kernel, not to the launch. Other host threads may launch the kernel with other sizes
      // at the same time, so the limit is always the largest.
      error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
    if (error == cudaSuccess) {
      // Asks the driver for the most shared memory, so that as many blocks as possible run at once. By default it may
      // use more for the cache.
      error =
          cudaFuncSetAttribute(KERNEL, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    }
    if (error != cudaSuccess) {
      cudaGetLastError();  // clears the error, which the next launch would report
      return error;
    }
  }
  KERNEL<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace longvq::cuda

#else

#include "../on_host/machine.h"

#endif
