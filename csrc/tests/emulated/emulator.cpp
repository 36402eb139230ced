// The threads of one block as stacks that hand over to each other at barriers.

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr unsigned kMaxThreads = 1024, kWarp = 32;
constexpr std::size_t kStack = 256 * 1024;

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::kDone;
  float offered[2] =
      {};  // to shuffles; two, so that the next does not overwrite what is being read
  int turn = 0;
};

std::vector<Thread> threads(kMaxThreads);
ucontext_t scheduler;
unsigned current = 0;
const std::function<void()>* body = nullptr;
std::mt19937 order_generator;
cudaError_t last_error = cudaSuccess;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel, block %u, thread %u: %s\n", blockIdx.x, current, what);
  std::abort();
}

void wait_at(State barrier) {
  const unsigned self = current;
  threads[self].state = barrier;
  swapcontext(&threads[self].context, &scheduler);
}

void start() {
  (*body)();
  threads[current].state = State::kDone;
  swapcontext(&threads[current].context, &scheduler);
}

void prepare(unsigned index) {
  Thread& thread = threads[index];
  if (!thread.stack) thread.stack.reset(new char[kStack]);
  thread.state = State::kReady;
  thread.turn = 0;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = kStack;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, start, 0);
}

// Lets [first, last) go on if all of them wait at the barrier; false if none waits there.
bool release(unsigned first, unsigned last, State barrier) {
  unsigned waiting = 0;
  for (unsigned i = first; i < last; ++i) waiting += threads[i].state == barrier;
  if (waiting == 0) return false;
  if (waiting < last - first) {
    current = first;
    fail(barrier == State::kAtWarpBarrier ? "not every lane of its warp reaches a warp's barrier"
                                          : "not every thread of its block reaches __syncthreads");
  }
  for (unsigned i = first; i < last; ++i) threads[i].state = State::kReady;
  return true;
}

// One warp alone, past its own barriers, until all its lanes wait at the block's or have ended.
void run_warp(unsigned first, unsigned last) {
  std::vector<unsigned> lanes(last - first);
  std::iota(lanes.begin(), lanes.end(), first);
  do {
    std::shuffle(lanes.begin(), lanes.end(), order_generator);
    for (const unsigned lane : lanes) {
      if (threads[lane].state != State::kReady) continue;
      current = lane;
      threadIdx = dim3(lane, 0, 0);
      swapcontext(&scheduler, &threads[lane].context);
    }
  } while (release(first, last, State::kAtWarpBarrier));
}

// Between two barriers of the block a warp may be done before another begins, and is: memory that
// one reuses while another still needs it shows.
void run_block() {
  const unsigned count = blockDim.x;
  for (unsigned i = 0; i < count; ++i) prepare(i);
  std::vector<unsigned> warps((count + kWarp - 1) / kWarp);
  std::iota(warps.begin(), warps.end(), 0u);
  do {
    std::shuffle(warps.begin(), warps.end(), order_generator);
    for (const unsigned warp : warps) run_warp(warp * kWarp, std::min((warp + 1) * kWarp, count));
  } while (release(0, count, State::kAtBlockBarrier));
}

}  // namespace

void __syncthreads() { wait_at(State::kAtBlockBarrier); }

void __syncwarp(unsigned mask) {
  if (mask != 0xffffffffu) fail("only whole warps are emulated");
  wait_at(State::kAtWarpBarrier);
}

float __shfl_xor_sync(unsigned mask, float value, int lanes) {
  const unsigned self = current;
  const int turn = threads[self].turn;
  threads[self].turn = 1 - turn;
  threads[self].offered[turn] = value;
  __syncwarp(mask);
  return threads[self ^ static_cast<unsigned>(lanes)].offered[turn];
}

namespace emulated {

cudaError_t run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  static std::mutex one_grid;
  const std::lock_guard<std::mutex> lock(one_grid);
  if (config.blockDim.x == 0 || config.blockDim.x > kMaxThreads || config.gridDim.x == 0 ||
      config.gridDim.y == 0) {
    last_error = cudaErrorInvalidConfiguration;
    return last_error;
  }
  body = &thread;
  blockDim = config.blockDim, gridDim = config.gridDim;
  std::vector<unsigned> order(gridDim.x * gridDim.y);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), order_generator);
  for (const unsigned block : order) {
    blockIdx = dim3(block % gridDim.x, block / gridDim.x, 0);
    run_block();
  }
  return cudaSuccess;
}

}  // namespace emulated

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
