#include "block.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../../common/export.h"

namespace on_host {
namespace {

constexpr size_t kStack = 128 << 10;
constexpr size_t kGuard = 64;  // bytes on either side of shared memory that kernels must not change
constexpr unsigned char kGuardByte = 0xA5;
constexpr unsigned char kUnset = 0xFF;  // 16-bit and 32-bit numbers of these bytes are NaN

constexpr size_t kUnit = 16;  // bytes that one copy writes

struct Copy {
  void* target;
  const void* source;
  int bytes;

  void make() const {
    std::memcpy(target, source, bytes);
    std::memset(static_cast<char*>(target) + bytes, 0, kUnit - bytes);
  }
};

enum class State { kReady, kAtBarrier, kAtCollective, kDone };

struct Fiber {
  Position position;
  State state = State::kReady;
  bool started = false;
  ucontext_t context;  // for the first start; later jumps need no system calls
  jmp_buf resumed;
  std::unique_ptr<char[]> stack{new char[kStack]};
  std::vector<Copy> open;                // copies that are not committed yet
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
};

struct Warp {
  std::vector<Fiber*> fibers;
  Collective operation = nullptr;
  void* arguments[kWarpSize];
  int arrived = 0;
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::vector<char> memory;   // guard, shared memory, guard
  std::vector<bool> awaited;  // for each unit of shared memory: whether a copy to it is open
  int at_barrier = 0;
};

uint64_t thread_order = 0;
Block* block = nullptr;
Fiber* running = nullptr;
jmp_buf scheduler;
const std::function<void()>* body_of_kernel = nullptr;

bool planning = false;
// A line for each launch: the mangled name of a type that contains the kernel, and the bytes of shared memory.
std::string plan;

// The kernel's error. Exceptions can't leave a fiber, so the scheduler throws it.
std::string misuse;

[[noreturn]] void refuse(const char* what) {
  misuse = what;
  _longjmp(scheduler, 1);
}

// Returns to the scheduler until another fiber makes this one ready.
void pause() {
  if (_setjmp(running->resumed) == 0) {
    _longjmp(scheduler, 1);
  }
}

void entry() {
  (*body_of_kernel)();
  running->state = State::kDone;
  _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  running = &fiber;
  if (_setjmp(scheduler) == 0) {
    if (fiber.started) {
      _longjmp(fiber.resumed, 1);
    }
    fiber.started = true;
    setcontext(&fiber.context);
  }
  running = nullptr;
}

void prepare(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

std::vector<size_t> ordered(size_t count, std::mt19937_64& random) {
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (thread_order == 1) {
    std::reverse(order.begin(), order.end());
  } else if (thread_order > 1) {
    std::shuffle(order.begin(), order.end(), random);
  }
  return order;
}

// Whether copies happen at once, which reveals targets that are still being read, or when they are waited for, which
// reveals targets that are read too soon. CUDA allows both.
bool copies_are_early() {
  return thread_order % 2 == 1;
}

size_t unit_of(const void* target) {  // very large for addresses before shared memory
  return (reinterpret_cast<uintptr_t>(target) - reinterpret_cast<uintptr_t>(shared_memory())) / kUnit;
}

void check_guards(size_t shared_bytes) {
  const auto spoilt = [](char c) { return static_cast<unsigned char>(c) != kGuardByte; };
  const auto begin = block->memory.begin(), end = block->memory.end();
  if (std::any_of(begin, begin + kGuard, spoilt) || std::any_of(begin + kGuard + shared_bytes, end, spoilt)) {
    throw std::runtime_error("a kernel wrote outside of its shared memory");
  }
}

void run_block(dim3 index, dim3 size, dim3 grid, size_t shared_bytes, std::mt19937_64& random) {
  std::fill(block->memory.begin(), block->memory.end(), static_cast<char>(kGuardByte));
  std::memset(shared_memory(), kUnset, shared_bytes);
  block->awaited.assign(shared_bytes / kUnit, false);
  block->at_barrier = 0;
  for (size_t i = 0; i < block->fibers.size(); ++i) {
    Fiber& fiber = *block->fibers[i];
    fiber.position = {dim3(i), index, size, grid, static_cast<int>(i % kWarpSize)};
    fiber.state = State::kReady;
    fiber.started = false;
    fiber.open.clear();
    fiber.groups.clear();
    prepare(fiber);
  }
  for (Warp& warp : block->warps) {
    warp.arrived = 0;
  }
  size_t done = 0;
  while (done < block->fibers.size()) {
    bool moved = false;
    for (size_t i : ordered(block->fibers.size(), random)) {
      Fiber& fiber = *block->fibers[i];
      if (fiber.state == State::kReady) {
        resume(fiber);
        if (!misuse.empty()) {
          throw std::runtime_error(std::exchange(misuse, {}));
        }
        done += fiber.state == State::kDone;
        moved = true;
      }
    }
    if (!moved) {
      throw std::runtime_error("some threads of a block wait at a barrier that others never reach");
    }
  }
  check_guards(shared_bytes);
}

}  // namespace

const Position& position() {
  return running->position;
}

char* shared_memory() {
  return block->memory.data() + kGuard;
}

void synchronize_block() {
  running->state = State::kAtBarrier;
  if (++block->at_barrier == static_cast<int>(block->fibers.size())) {
    block->at_barrier = 0;
    for (auto& fiber : block->fibers) {
      fiber->state = State::kReady;
    }
    if (thread_order == 0) {
      return;  // the last thread to arrive continues, as a GPU may do
    }
  }
  pause();
}

void synchronize_warp(Collective operation, void* mine) {
  Warp& warp = block->warps[running->position.thread.x / kWarpSize];
  if (warp.arrived == 0) {
    warp.operation = operation;
  } else if (warp.operation != operation) {
    refuse("lanes of a warp meet in different instructions");
  }
  warp.arguments[running->position.lane] = mine;
  running->state = State::kAtCollective;
  if (++warp.arrived == kWarpSize) {
    operation(warp.arguments);
    warp.arrived = 0;
    for (Fiber* fiber : warp.fibers) {
      fiber->state = State::kReady;
    }
    return;
  }
  pause();
}

void check_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % kUnit != 0) {
    refuse("16 bytes at an address that is no multiple of 16");
  }
}

void copy_async(void* target, const void* source, int bytes) {
  check_aligned(target);
  check_aligned(source);  // even if no byte is read
  const size_t unit = unit_of(target);
  if (unit >= block->awaited.size()) {
    refuse("a copy to outside of shared memory");
  }
  if (block->awaited[unit]) {
    refuse("a copy to the target of an open copy");
  }
  block->awaited[unit] = true;
  running->open.push_back({target, source, bytes});
  if (copies_are_early()) {
    running->open.back().make();
  }
}

void commit_copies() {
  running->groups.push_back(std::move(running->open));
  running->open.clear();
}

void wait_for_copies(int newest) {
  for (; static_cast<int>(running->groups.size()) > newest; running->groups.pop_front()) {
    for (const Copy& copy : running->groups.front()) {
      block->awaited[unit_of(copy.target)] = false;
      if (!copies_are_early()) {
        copy.make();
      }
    }
  }
}

void run_grid(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
    throw std::runtime_error("a grid without blocks");
  }
  if (size.y != 1 || size.z != 1 || size.x % kWarpSize != 0) {
    throw std::runtime_error("a block on the host must be one row of whole warps");
  }
  Block own;
  own.memory.resize(shared_bytes + 2 * kGuard);
  own.warps.resize(size.x / kWarpSize);
  for (unsigned i = 0; i < size.x; ++i) {
    own.fibers.push_back(std::make_unique<Fiber>());
    own.warps[i / kWarpSize].fibers.push_back(own.fibers.back().get());
  }
  block = &own;
  body_of_kernel = &body;
  std::mt19937_64 random(thread_order);
  for (size_t i : ordered(size_t{grid.x} * grid.y * grid.z, random)) {
    const dim3 index(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    run_block(index, size, grid, shared_bytes, random);
  }
  block = nullptr;
}

bool should_run(const char* mangled_name, size_t shared_bytes) {
  if (planning) {
    plan += std::string(mangled_name) + ' ' + std::to_string(shared_bytes) + '\n';
  }
  return !planning;
}

}  // namespace on_host

// Sets the order of threads and blocks: 0 ascending, 1 descending, others seed a random order. With an odd number,
// asynchronous copies happen at once.
LONGVQ_EXPORT void longvq_on_host_set_order(uint64_t order) {
  on_host::thread_order = order;
}

LONGVQ_EXPORT void longvq_on_host_begin_plan() {
  on_host::planning = true;
  on_host::plan.clear();
}

LONGVQ_EXPORT const char* longvq_on_host_end_plan() {
  on_host::planning = false;
  return on_host::plan.c_str();
}
