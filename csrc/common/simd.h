// Vectors of one register. Files named *_kernel.cpp are compiled once per instruction set, others once for the
// baseline.
//
// Everything here is in an anonymous namespace, and *_kernel.cpp files may include only such headers. The linker keeps
// a single copy of an inline function that several files share, and this copy could use instructions that the CPU does
// not have.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

// LONGVQ_JOIN(assign_kernel_, LONGVQ_ISA) is the name of a kernel for one instruction set.
#define LONGVQ_JOIN_(a, b) a##b
#define LONGVQ_JOIN(a, b) LONGVQ_JOIN_(a, b)

namespace longvq {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kHalf = kLanes / 2;  // lanes of a register of doubles

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t)), may_alias));
typedef int32_t SignedWords __attribute__((vector_size(kLanes * sizeof(int32_t)), may_alias));
typedef uint16_t Shorts __attribute__((vector_size(kLanes * sizeof(uint16_t)), may_alias));
typedef float HalfFloats __attribute__((vector_size(kHalf * sizeof(float)), may_alias));
typedef double Doubles __attribute__((vector_size(kHalf * sizeof(double)), may_alias));
typedef int64_t Longs __attribute__((vector_size(kHalf * sizeof(int64_t)), may_alias));

template <typename Vector>
inline Vector load(const void* memory) {  // memory may have any alignment
  Vector value;
  std::memcpy(&value, memory, sizeof value);
  return value;
}

template <typename Vector>
inline void store(void* memory, Vector value) {
  std::memcpy(memory, &value, sizeof value);
}

// The lanes of a, then of b, with the given indices. GCC before 12 does not have __builtin_shufflevector.
template <std::size_t... I>
inline Floats lanes_of(Floats a, Floats b, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, SignedWords{static_cast<int32_t>(I)...});
#endif
}

inline float largest(Floats x) {
  float value = x[0];
  for (int i = 1; i < kLanes; ++i) {
    value = x[i] > value ? x[i] : value;
  }
  return value;
}

// Starts with 0, so the sum of lanes that are all -0 is 0.
inline float sum_of(Floats x) {
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) {
    total += x[i];
  }
  return total;
}

// Keeps a value in a register. Without it, compilers load the value again for each instruction that uses it.
inline void keep(Floats& value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#else
  (void)value;
#endif
}

// During its lifetime, subnormal results become zero: decaying states would otherwise be subnormal for many steps,
// which is slow on many processors. Subnormal inputs keep their value, even if the caller flushes them to zero. Has no
// effect on processors other than x86.
class FlushToZero {
#if defined(__x86_64__)
 public:
  FlushToZero() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr((saved_ | 0x8000u) & ~0x40u); }
  ~FlushToZero() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  unsigned saved_;
#else
 public:
  FlushToZero() {}
  ~FlushToZero() {}
#endif
};

// Half h of a register of floats in memory, as doubles.
inline Doubles widened(const Floats* memory, int h) {
  return __builtin_convertvector(reinterpret_cast<const HalfFloats*>(memory)[h], Doubles);
}

inline void narrow(Floats* memory, int h, Doubles value) {
  reinterpret_cast<HalfFloats*>(memory)[h] = __builtin_convertvector(value, HalfFloats);
}

}  // namespace
}  // namespace longvq
