// What the kernels of this folder need of the machine they are compiled for: a GPU (nvcc), or the host that runs the
// same kernels thread by thread in tests (any C++17 compiler, see on_host/block.h).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "params.h"

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
// From the lane `by` below; the lowest lanes keep their own.
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

// A bit for each lane of the warp.
LONGVQ_DEVICE uint32_t ballot(bool x) {
  return __ballot_sync(0xffffffffu, x);
}
// The number of the lowest bit that is set, −1 if none is.
LONGVQ_DEVICE int lowest_bit(uint32_t bits) {
  return __ffs(static_cast<int>(bits)) - 1;
}

LONGVQ_DEVICE void synchronize_warp() {
  __syncwarp();
}

// The compiler must take x for another number than before: what is computed from it isn't kept in registers meanwhile.
LONGVQ_DEVICE void forget(int& x) {
  asm volatile("" : "+r"(x));
}

LONGVQ_DEVICE float fast_exponential(float x) {
  return __expf(x);
}  // to about 2^-22 (2 + |x|)

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

// 16 bytes of global memory in one access, at a multiple of 16.
LONGVQ_DEVICE void store_together(void* to, const uint32_t (&x)[4]) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

// Copies the first `bytes` of 16 from global to shared memory and makes the others zero, asynchronously.
LONGVQ_DEVICE void copy_later(void* target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source), "r"(bytes)
               : "memory");
}
LONGVQ_DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int NEWEST>
LONGVQ_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(NEWEST) : "memory");
}

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

// Two numbers rounded to 16 bits, the first in the low half.
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

// Runs the kernel; 0, or the error of the CUDA runtime.
template <auto KERNEL, typename... Arguments>
int launch(dim3 grid, int threads, size_t shared_bytes, void* stream, const Arguments&... arguments) {
  if (shared_bytes > 0) {
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error == cudaSuccess && shared_bytes > static_cast<size_t>(most)) {
      return kNotCovered;
    }
    if (error == cudaSuccess) {
      // A permission, of the function: as much as there is, since other threads may launch it with other sizes.
      error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
    if (error == cudaSuccess) {
      // So that all blocks which fit into it may run: the driver may keep more of it for a cache.
      error =
          cudaFuncSetAttribute(KERNEL, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    }
    if (error != cudaSuccess) {
      cudaGetLastError();  // not to be found by the next launch
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
