// As much of CUDA as the kernels of csrc/cuda use, on the CPU: with this folder first among the
// include paths their sources are host C++. Threads of a block are fibers that take turns at
// barriers and shuffles; the last comes first if EXL3_HOST_REVERSED is set, so that a missing
// barrier shows. Shared memory begins as rubbish.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx;

struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace cuda_host {

constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStack = 1 << 16;

struct Fiber {
  jmp_buf place;
  bool started = false, done = false, at_block_barrier = false, at_warp_barrier = false;
};

inline std::vector<Fiber> fibers;
inline std::vector<char> stacks(kMaxThreads * kStack);
inline int current, arrived[kMaxThreads / kWarp];
inline uint64_t slots[kMaxThreads];  // what lanes show each other
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::vector<uint4> memory;

inline void* dynamic_memory() { return memory.data(); }

// Jumps, for contexts of the system save signal masks too: a thousand times slower.
[[gnu::noinline]] inline void yield() {
  if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

inline void enter() {
  body();
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}

[[gnu::noinline]] inline void resume(int thread) {
  current = thread;
  threadIdx = dim3(thread);
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = &stacks[thread * kStack];
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

inline void warp_barrier() {
  const int warp = current / kWarp;
  if (++arrived[warp] < kWarp) {
    fibers[current].at_warp_barrier = true;
    yield();
    return;
  }
  arrived[warp] = 0;
  for (int lane = 0; lane < kWarp; ++lane) fibers[warp * kWarp + lane].at_warp_barrier = false;
}

inline void block_barrier() {
  fibers[current].at_block_barrier = true;
  yield();
}

// Lanes of a warp until none can go on.
inline void run_warp(int warp, bool reversed) {
  for (bool moved = true; moved;) {
    moved = false;
    for (int i = 0; i < kWarp; ++i) {
      const int thread = warp * kWarp + (reversed ? kWarp - 1 - i : i);
      const Fiber& fiber = fibers[thread];
      if (fiber.done || fiber.at_block_barrier || fiber.at_warp_barrier) continue;
      resume(thread);
      moved = true;
    }
  }
}

inline void run_block(int threads, bool reversed) {
  fibers.assign(threads, Fiber());
  memset(arrived, 0, sizeof arrived);
  const int warps = threads / kWarp;
  for (bool any = true; any;) {
    for (int i = 0; i < warps; ++i) run_warp(reversed ? warps - 1 - i : i, reversed);
    any = false;
    for (Fiber& fiber : fibers) {
      if (fiber.at_warp_barrier) {
        fprintf(stderr, "lanes of a warp went different ways\n");
        abort();
      }
      any = any || !fiber.done;
      fiber.at_block_barrier = false;
    }
  }
}

template <class Kernel>
cudaError_t run(dim3 grid, int threads, int shared, Kernel kernel) {
  if (threads % kWarp != 0 || threads > kMaxThreads) return cudaErrorInvalidConfiguration;
  body = kernel;
  const bool reversed = getenv("EXL3_HOST_REVERSED") != nullptr;
  for (unsigned block = 0; block < grid.x; ++block) {
    blockIdx = dim3(block, 0);
    memory.assign(shared / sizeof(uint4) + 1, {~0u, ~0u, ~0u, ~0u});
    run_block(threads, reversed);
  }
  return cudaSuccess;
}

template <class T>
T exchanged(T mine, int lane) {
  memcpy(&slots[current], &mine, sizeof(T));
  warp_barrier();
  T theirs;
  memcpy(&theirs, &slots[current / kWarp * kWarp + lane], sizeof(T));
  warp_barrier();
  return theirs;
}

}  // namespace cuda_host

inline void __syncthreads() { cuda_host::block_barrier(); }

template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return cuda_host::exchanged(x, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return cuda_host::exchanged(x, cuda_host::current % cuda_host::kWarp ^ mask);
}

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T min(T a, T b) {
  return a < b ? a : b;
}

inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  }
  return result;
}

inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 0xFF) * (b >> i & 0xFF);
  return c;
}
