// Memory aligned for the widest registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

namespace longvq {

constexpr int64_t kAlignment = 64;  // bytes: one AVX-512 register, one cache line

struct AlignedDelete {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{kAlignment}); }
};

template <typename T>
using AlignedArray = std::unique_ptr<T[], AlignedDelete>;

template <typename T>
AlignedArray<T> aligned_array(int64_t size) {
  const std::size_t bytes = static_cast<std::size_t>(std::max<int64_t>(size, 1)) * sizeof(T);
  return AlignedArray<T>(static_cast<T*>(::operator new(bytes, std::align_val_t{kAlignment})));
}

}  // namespace longvq
