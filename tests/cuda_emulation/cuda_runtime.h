// The part of CUDA that csrc/*.cu use, on a CPU: a test compiles those files with this header in place of CUDA's, so
// that the kernels run, thread for thread, on a machine without a GPU.
//
// Blocks run one after the other, in random order. The threads of a block are fibers that change places at barriers, at
// warp operations and now and then at atomics, in random order; some warps are held back after a barrier. What the
// model of CUDA forbids ends the program with a message: a lane that is named in a mask and has ended or waits
// elsewhere, a barrier that some threads miss.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kLanes = 32;
constexpr size_t kStack = 64 * 1024;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulated GPU: %s\n", what);
  abort();
}

enum class State { kReady, kAtBarrier, kAtWarpOperation, kDone };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf place;
  bool started = false;
  State state = State::kReady;
  dim3 index;
  unsigned mask = 0;           // of the warp operation that it waits at
  const char* name = "";       // of that operation
  uint64_t given = 0;          // its own value
  uint64_t seen[kLanes] = {};  // the values of the lanes in `mask`
};

// One block at a time.
struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  unsigned threads = 0;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  std::function<void()> kernel;
  std::mt19937 random{1};
  uint32_t slow_warps = 0;  // those that wait until the others cannot go on; others after each barrier
};
inline Block block;

inline void give_way() {
  if (_setjmp(block.current->place) == 0) _longjmp(block.scheduler, 1);
}

inline void sometimes_give_way() {
  if (block.random() % 4 == 0) give_way();
}

inline void run_fiber() {
  block.kernel();
  block.current->state = State::kDone;
  _longjmp(block.scheduler, 1);
}

inline void resume(Fiber* fiber) {
  block.current = fiber;
  threadIdx = fiber->index;
  if (_setjmp(block.scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->place, 1);
  fiber->started = true;
  setcontext(&fiber->start);
}

inline void release_barrier() {
  for (unsigned i = 0; i < block.threads; ++i) {
    const State state = block.fibers[i]->state;
    if (state != State::kAtBarrier && state != State::kDone) return;
  }
  for (unsigned i = 0; i < block.threads; ++i) {
    if (block.fibers[i]->state == State::kAtBarrier) block.fibers[i]->state = State::kReady;
  }
  block.slow_warps = static_cast<uint32_t>(block.random());
}

inline void run_block(unsigned threads) {
  while (block.fibers.size() < threads) block.fibers.push_back(std::make_unique<Fiber>());
  block.threads = threads;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *block.fibers[i];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    makecontext(&fiber.start, run_fiber, 0);
    fiber.started = false;
    fiber.state = State::kReady;
    fiber.index = dim3(i, 0, 0);
  }
  std::vector<Fiber*> ready;
  for (;;) {
    ready.clear();
    bool done = true, any = false;
    for (unsigned i = 0; i < threads; ++i) {
      Fiber* fiber = block.fibers[i].get();
      done &= fiber->state == State::kDone;
      if (fiber->state != State::kReady) continue;
      any = true;
      if ((block.slow_warps >> (i / kLanes) & 1) == 0) ready.push_back(fiber);
    }
    if (done) return;
    if (!any) fail("all threads wait: at a barrier, or at different warp operations");
    if (ready.empty()) block.slow_warps = 0;
    std::shuffle(ready.begin(), ready.end(), block.random);
    for (Fiber* fiber : ready) {
      resume(fiber);
      if (fiber->state == State::kAtBarrier || fiber->state == State::kDone) release_barrier();
    }
  }
}

// Hands `value` to the lanes of `mask` and waits for theirs.
inline const uint64_t* exchange(unsigned mask, uint64_t value, const char* name) {
  Fiber* me = block.current;
  const unsigned lane = me->index.x % kLanes, first = me->index.x - lane;
  if ((mask >> lane & 1) == 0) fail("a lane is not in its own mask");
  me->mask = mask;
  me->name = name;
  me->given = value;
  me->state = State::kAtWarpOperation;
  bool all = true;
  for (unsigned i = 0; i < kLanes; ++i) {
    if ((mask >> i & 1) == 0) continue;
    const Fiber* other = first + i < block.threads ? block.fibers[first + i].get() : nullptr;
    if (other == nullptr || other->state == State::kDone) fail("a lane of the mask has ended");
    if (other->state == State::kAtBarrier) fail("a lane of the mask waits at a barrier");
    // A lane may still be at the operation before, with another mask.
    all &= other->state == State::kAtWarpOperation && other->mask == mask && strcmp(other->name, name) == 0;
  }
  if (!all) {
    give_way();
    return me->seen;
  }
  for (unsigned to = 0; to < kLanes; ++to) {
    if ((mask >> to & 1) == 0) continue;
    Fiber* receiver = block.fibers[first + to].get();
    for (unsigned from = 0; from < kLanes; ++from) {
      receiver->seen[from] = mask >> from & 1 ? block.fibers[first + from]->given : 0;
    }
    receiver->state = State::kReady;
  }
  return me->seen;
}

template <typename T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8, "one word");
  uint64_t word = 0;
  memcpy(&word, &value, sizeof(T));
  return word;
}

template <typename T>
T from_word(uint64_t word) {
  T value;
  memcpy(&value, &word, sizeof(T));
  return value;
}

}  // namespace emulation

inline void __syncthreads() {
  emulation::block.current->state = emulation::State::kAtBarrier;
  emulation::give_way();
}

// ---- Warp operations.

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::exchange(mask, 0, "syncwarp"); }

inline unsigned __ballot_sync(unsigned mask, bool condition) {
  const uint64_t* seen = emulation::exchange(mask, condition, "ballot");
  unsigned all = 0;
  for (int i = 0; i < emulation::kLanes; ++i) all |= static_cast<unsigned>(seen[i]) << i;
  return all;
}
inline int __any_sync(unsigned mask, bool condition) { return __ballot_sync(mask, condition) != 0; }
inline int __all_sync(unsigned mask, bool condition) { return __ballot_sync(mask, condition) == mask; }

template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  const uint64_t mine = emulation::to_word(value);
  const uint64_t* seen = emulation::exchange(mask, mine, "match_any");
  unsigned same = 0;
  for (int i = 0; i < emulation::kLanes; ++i) same |= static_cast<unsigned>(seen[i] == mine && (mask >> i & 1)) << i;
  return same;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  const uint64_t* seen = emulation::exchange(mask, emulation::to_word(value), "shfl");
  if ((mask >> (lane & 31) & 1) == 0) emulation::fail("a shuffle reads a lane that is not in the mask");
  return emulation::from_word<T>(seen[lane & 31]);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const uint64_t* seen = emulation::exchange(mask, emulation::to_word(value), "shfl_xor");
  return emulation::from_word<T>(seen[lane ^ step]);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned step) {
  const int lane = static_cast<int>(threadIdx.x % 32), from = lane - static_cast<int>(step);
  const uint64_t* seen = emulation::exchange(mask, emulation::to_word(value), "shfl_up");
  return emulation::from_word<T>(seen[from < 0 ? lane : from]);
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  const uint64_t* seen = emulation::exchange(mask, value, "reduce_add");
  unsigned sum = 0;
  for (int i = 0; i < emulation::kLanes; ++i) sum += static_cast<unsigned>(seen[i]);
  return sum;
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  const uint64_t* seen = emulation::exchange(mask, value, "reduce_or");
  unsigned all = 0;
  for (int i = 0; i < emulation::kLanes; ++i) all |= static_cast<unsigned>(seen[i]);
  return all;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  const uint64_t* seen = emulation::exchange(mask, value, "reduce_max");
  unsigned most = 0;
  for (int i = 0; i < emulation::kLanes; ++i) most = std::max(most, static_cast<unsigned>(seen[i]));
  return most;
}

// ---- Atomics: another thread of the block may come first.

template <typename T, typename Change>
T emulated_atomic(T* at, Change change) {
  emulation::sometimes_give_way();
  const T before = *at;
  *at = change(before);
  return before;
}
template <typename T, typename V>
T atomicAdd(T* at, V value) {
  return emulated_atomic(at, [&](T old) { return static_cast<T>(old + value); });
}
template <typename T, typename V>
T atomicMin(T* at, V value) {
  return emulated_atomic(at, [&](T old) { return std::min<T>(old, value); });
}
template <typename T, typename V>
T atomicMax(T* at, V value) {
  return emulated_atomic(at, [&](T old) { return std::max<T>(old, value); });
}
template <typename T, typename V>
T atomicOr(T* at, V value) {
  return emulated_atomic(at, [&](T old) { return static_cast<T>(old | value); });
}
template <typename T, typename V>
T atomicXor(T* at, V value) {
  return emulated_atomic(at, [&](T old) { return static_cast<T>(old ^ value); });
}

// ---- Integers.

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
using std::max;
using std::min;

// ---- The runtime.

using cudaStream_t = struct EmulatedStream*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorNoDevice = 100;
struct cudaFuncAttributes {
  int maxThreadsPerBlock;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  return memset(at, value, bytes), cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using emulation::block;
  block.kernel = [&] { kernel(arguments...); };
  blockDim = config->blockDim;
  gridDim = config->gridDim;
  std::vector<unsigned> order(config->gridDim.x);
  for (unsigned i = 0; i < config->gridDim.x; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), block.random);
  for (const unsigned index : order) {
    blockIdx = dim3(index);
    emulation::run_block(config->blockDim.x);
  }
  return cudaSuccess;
}
