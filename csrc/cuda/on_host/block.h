// CUDA's execution model on the host: what a kernel of this folder means, for tests on machines without a GPU.
//
// The threads of a block are fibers of one host thread. A fiber runs until it waits for others: at __syncthreads() for
// the block, in a shuffle or a tensor core instruction for its warp. In between the order of the threads is the
// caller's choice, ascending, descending or random: results that depend on it reveal a missing barrier. So is that of
// blocks, which run one after the other: results that depend on it reveal blocks that count on each other. Asynchronous
// copies are made as late as the kernel's waits allow, in some orders at once, and shared memory starts as NaN, so that
// a value that is used before it is there, or replaced while it is needed, is noticed. Two copies to one place of which
// none was waited for are an error. So is a barrier that not all threads reach: not a hang.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace on_host {

constexpr int kWarpSize = 32;

struct Position {
  dim3 thread, block, block_size, grid;
  int lane;
};

// Of the thread that runs now.
const Position& position();
char* shared_memory();

// All threads of the block arrive before any goes on.
void synchronize_block();

// All lanes of the warp arrive, each with a pointer; then `operation` is called once with the 32 of them.
using Collective = void (*)(void* const* lanes);
void synchronize_warp(Collective operation, void* mine);

// Misuse of an instruction that takes 16 bytes at a time unless this is a multiple of 16.
void check_aligned(const void* address);

// A copy of 16 bytes, of which all but the first `bytes` become zero, that is there when it has been waited for.
void copy_later(void* target, const void* source, int bytes);
void commit_copies();
void wait_for_copies(int newest_groups_that_may_be_missing);

// Runs body() for every thread of every block. Throws std::runtime_error where the kernel misuses what is above.
void run_grid(dim3 grid, dim3 block_size, size_t shared_bytes, const std::function<void()>& body);

// Whether a kernel that is launched runs. Between longvq_on_host_begin_plan and longvq_on_host_end_plan none does: what
// each asks for is noted instead.
bool starts(const char* mangled_name, size_t shared_bytes);

}  // namespace on_host
