#include "emulator.h"

#include <ucontext.h>

#include <cfenv>
#include <memory>
#include <mutex>
#include <vector>

thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t kStack = 256 << 10;
constexpr int kLanes = 32;

// Threads that wait for each other: all that have not returned.
struct Group {
  int alive = 0;
  int arrived = 0;
  unsigned met = 0;  // how often

  void check() {
    if (alive == 0 || arrived < alive) return;
    arrived = 0;
    ++met;
  }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
};

struct Block {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<Group> warps;
  std::vector<uint32_t> values;
  std::vector<uint4> shared;
  Group all;
  int running = 0;
  unsigned steps = 0;  // threads that got past a point where they waited, or returned
  const std::function<void()>* thread = nullptr;
};

thread_local Block block;

void wait(Group& group) {
  const unsigned before = group.met;
  ++group.arrived;
  group.check();
  Fiber& fiber = block.fibers[block.running];
  while (group.met == before) swapcontext(&fiber.context, &block.scheduler);
  ++block.steps;
}

void run_fiber() {
  (*block.thread)();
  Fiber& fiber = block.fibers[block.running];
  fiber.done = true;
  ++block.steps;
  for (Group* group : {&block.all, &block.warps[block.running / kLanes]}) {
    --group->alive;
    group->check();
  }
  swapcontext(&fiber.context, &block.scheduler);
}

void run_block(int threads) {
  block.all = {threads};
  block.warps.assign((threads + kLanes - 1) / kLanes, {});
  block.values.assign(block.warps.size() * kLanes, 0);
  if (static_cast<int>(block.fibers.size()) < threads) block.fibers.resize(threads);
  for (int i = 0; i < threads; ++i) {
    ++block.warps[i / kLanes].alive;
    Fiber& fiber = block.fibers[i];
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  while (block.all.alive > 0) {
    const unsigned before = block.steps;
    for (int i = 0; i < threads; ++i) {
      if (block.fibers[i].done) continue;
      block.running = i;
      threadIdx.x = i;
      swapcontext(&block.scheduler, &block.fibers[i].context);
    }
    if (block.steps == before) {
      std::fprintf(stderr, "emulator: the threads of a block wait for each other\n");
      std::abort();
    }
  }
}

}  // namespace

void launch(dim3 grid, dim3 threads, size_t dynamic_shared, const std::function<void()>& thread) {
  // XLA runs the calls of several devices at once.
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  // Numbers below the normal range are a GPU's too; XLA has them flushed on a CPU.
  std::fenv_t flushing;
  std::fegetenv(&flushing);
  std::fesetenv(FE_DFL_ENV);
  gridDim = grid, blockDim = threads, blockIdx = {};
  block.thread = &thread;
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
    // Fresh, and full of NaN: a kernel must not read what it did not write.
    block.shared.assign(dynamic_shared / sizeof(uint4) + 8, {~0u, ~0u, ~0u, ~0u});
    run_block(static_cast<int>(threads.x));
  }
  std::fesetenv(&flushing);
}

void* dynamic_shared() { return block.shared.data(); }
void meet_block() { wait(block.all); }
void meet_warp() { wait(block.warps[block.running / kLanes]); }

void offer(uint32_t value) {
  block.values[block.running] = value;
  meet_warp();
}

uint32_t offered(int lane) { return block.values[block.running / kLanes * kLanes + lane]; }

}  // namespace emulator
