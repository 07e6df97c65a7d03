// Arrays that are aligned for the widest registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

namespace longvq {

constexpr int64_t kAlignment = 64;  // bytes: one AVX-512 register, one cache line

// The array lies inside a block of ordinary new, because glibc before 2.38 can't reuse the freed blocks of aligned new:
// a loop that allocates and frees arrays of one size would take ever more memory. The address of the allocated block is
// stored before the array.
struct AlignedDelete {
  void operator()(void* array) const { ::operator delete(static_cast<void**>(array)[-1]); }
};

template <typename T>
using AlignedArray = std::unique_ptr<T[], AlignedDelete>;

template <typename T>
AlignedArray<T> aligned_array(int64_t size) {
  static_assert(alignof(T) <= kAlignment && std::is_trivially_default_constructible<T>::value, "plain numbers");
  std::size_t space = static_cast<std::size_t>(std::max<int64_t>(size, 1)) * sizeof(T) + kAlignment;
  void* const block = ::operator new(space + sizeof(void*));
  void* array = static_cast<void**>(block) + 1;
  std::align(kAlignment, space - kAlignment, array, space);
  static_cast<void**>(array)[-1] = block;
  return AlignedArray<T>(static_cast<T*>(array));
}

}  // namespace longvq
