// Vectors of one register of the instruction set that the file is compiled for: *_kernel.cpp, once per instruction set,
// and others, which have the baseline's. Everything is in an anonymous namespace: the linker keeps one copy of a shared
// inline function, and it could be the one with instructions that this CPU lacks.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

// LONGVQ_JOIN(assign_kernel_, LONGVQ_ISA) is the name of a variant, in *_kernel.cpp.
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
constexpr int kHalf = kLanes / 2;  // a register of floats holds the values of two registers of doubles

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t)), may_alias));
typedef int32_t SignedWords __attribute__((vector_size(kLanes * sizeof(int32_t)), may_alias));
typedef uint16_t Shorts __attribute__((vector_size(kLanes * sizeof(uint16_t)), may_alias));
typedef float HalfFloats __attribute__((vector_size(kHalf * sizeof(float)), may_alias));
typedef double Doubles __attribute__((vector_size(kHalf * sizeof(double)), may_alias));
typedef int64_t Longs __attribute__((vector_size(kHalf * sizeof(int64_t)), may_alias));

template <typename Vector>
inline Vector load(const void* memory) {  // any alignment
  Vector value;
  std::memcpy(&value, memory, sizeof value);
  return value;
}

template <typename Vector>
inline void store(void* memory, Vector value) {
  std::memcpy(memory, &value, sizeof value);
}

// Lanes of a, then of b, by their index; GCC before 12 lacks clang's name for it.
template <std::size_t... I>
inline Floats lanes_of(Floats a, Floats b, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, SignedWords{static_cast<int32_t>(I)...});
#endif
}

// Keeps a value that several instructions need in a register: compilers would rather load it again for each of them.
inline void keep(Floats& value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#else
  (void)value;
#endif
}

// While it lives, results too small for a normal number become zero: decaying states would otherwise spend long in
// subnormal numbers, which are slow on many processors. Subnormal inputs keep their value, also where the caller has
// them taken for zero. Elsewhere than on x86 nothing changes.
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

// Lanes h * kHalf .. of a register in memory, as doubles.
inline Doubles widened(const Floats* memory, int h) {
  return __builtin_convertvector(reinterpret_cast<const HalfFloats*>(memory)[h], Doubles);
}

inline void narrow(Floats* memory, int h, Doubles value) {
  reinterpret_cast<HalfFloats*>(memory)[h] = __builtin_convertvector(value, HalfFloats);
}

}  // namespace
}  // namespace longvq
