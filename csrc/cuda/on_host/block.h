// CUDA's execution model on the host, so that tests can run the kernels on machines without a GPU.
//
// Threads: the threads of a block are fibers of one host thread. A fiber runs until it waits for other threads: for its
// block at __syncthreads(), for its warp in a shuffle or a tensor core instruction. Between these points the caller
// chooses the order of the threads: ascending, descending or random. A result that depends on the order reveals a
// missing barrier. Blocks run one after the other, in an order that the caller chooses in the same way. A result that
// depends on this order reveals blocks that rely on each other.
//
// Memory: shared memory starts as NaN. Asynchronous copies happen as late as the kernel's waits allow, or, in some
// orders, at once. This reveals values that are read before they arrive, or overwritten while they are needed.
//
// Errors instead of hangs or silent races: two copies to one place without a wait between them, and a barrier that some
// threads never reach.
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

// Where the running thread is, and the shared memory of its block.
const Position& position();
char* shared_memory();

// Waits for all threads of the block.
void synchronize_block();

// Waits for all lanes of the warp. Then one call of `operation` gets the pointers `mine` of all 32 lanes.
using Collective = void (*)(void* const* lanes);
void synchronize_warp(Collective operation, void* mine);

// Raises unless the address is a multiple of 16, as instructions on 16 bytes require.
void check_aligned(const void* address);

// Starts a copy of `bytes` bytes, filled up with zeros to 16. It is complete after a wait.
void copy_async(void* target, const void* source, int bytes);
void commit_copies();
void wait_for_copies(int num_newest_groups_not_awaited);

// Runs body() for every thread of every block. Throws std::runtime_error if the kernel misuses these functions.
void run_grid(dim3 grid, dim3 block_size, size_t shared_bytes, const std::function<void()>& body);

// Whether a launch should run its kernel. Between longvq_on_host_begin_plan and longvq_on_host_end_plan no kernel runs;
// the plan records each launch and its shared memory instead.
bool should_run(const char* mangled_name, size_t shared_bytes);

}  // namespace on_host
