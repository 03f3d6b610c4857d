// The trellis search's way back: from kept costs to the states of the cheapest path.
//
// From a node at one kept row back to the row before it, all nodes that can lead there are walked
// forward once more, now with a record of the branches that win. They double K times with every
// step back, and shrink to the one node walking forward: a small part of a step's work.
#pragma once

#include "cuda/encode_plan.cuh"
#include "cuda/launch.hpp"

namespace exl3::cuda {

// Asks for a row that will be read soon.
__device__ __forceinline__ void prefetch(const void* address) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
  (void)address;
#endif
}

// Shared memory of a block.
template <int K>
struct TraceMemory {
  static constexpr int kMost = 1 << K * (kPlans[K].spacing - 1);  // nodes behind the first step
  uint32_t target[kLength];
  uint16_t state[kLength];
  uint16_t node_at[kLength + 1];  // of the path, at each kept row
  uint16_t cost[2][kMost];        // after the last step and the one before
  uint8_t chosen[2 * kMost];      // the branch to each of n nodes at [n, 2 n): n tells the step
  uint32_t least[kTracers / kWarp];
};

// A block that traces one tile. All its threads call everything and get the same results.
template <int K>
struct Tracer {
  using X = Trellis<K>;
  const Codebook& codebook;
  const Walk walk;
  const uint16_t* rows;
  TraceMemory<K>& shared;

  // The cheapest node of the last row, the first of several.
  __device__ int cheapest() const {
    const uint16_t* row = rows + walk.rows() * X::kNodes;
    uint32_t least = ~0u;  // cost, node
    for (int node = threadIdx.x; node < X::kNodes; node += kTracers) {
      least = min(least, uint32_t{row[X::kept_place(node)]} << 16 | node);
    }
    least = least_of_lanes(least, kWarp);
    if (threadIdx.x % kWarp == 0) shared.least[threadIdx.x / kWarp] = least;
    __syncthreads();
    for (int i = 0; i < kTracers / kWarp; ++i) least = min(least, shared.least[i]);
    return least & 0xFFFF;
  }

  // Follows the cheapest path back from `end`. If it joins the path of an earlier call it leads
  // on like that one, which saves the rest. Returns the node it starts from.
  __device__ int trace(int end, bool again) {
    int node = end;
    for (int row = walk.rows(); row > 0; --row) {
      const int first = walk.steps_before(row - 1), length = walk.steps_before(row) - first;
      prefetch_row(row - 2);
      for (int step = 1; step <= length; ++step) {
        widen(rows + (row - 1) * X::kNodes, first, step, length, node);
        __syncthreads();
      }
      node = read_off(first, length, node);
      const bool joined = again && shared.node_at[row - 1] == node;
      __syncthreads();
      if (joined) return shared.node_at[0];
      if (threadIdx.x == 0) shared.node_at[row - 1] = static_cast<uint16_t>(node);
    }
    __syncthreads();
    return node;
  }

 private:
  static __device__ __forceinline__ uint32_t least_of_lanes(uint32_t x, int lanes) {
    for (int mask = 1; mask < lanes; mask *= 2) x = min(x, from_lane_xor(x, mask));
    return x;
  }

  __device__ __forceinline__ void prefetch_row(int row) const {
    // With few bits rows are large and little of them is read.
    if (K < 3 || row < 0) return;
    const char* bytes = reinterpret_cast<const char*>(rows + row * X::kNodes);
    constexpr int kSector = 32;
    for (int at = threadIdx.x * kSector; at < X::kNodes * 2; at += kTracers * kSector) {
      prefetch(bytes + at);
    }
  }

  // Step `step` of the `length` that lead from `row` to node `end`: the cheapest branch to each
  // node from which `end` can be reached. Where they are few, lanes share the branches of one.
  __device__ __forceinline__ void widen(const uint16_t* row, int first, int step, int length,
                                        int end) {
    const int free = K * (length - step);  // bits of these nodes that `end` leaves free
    const int count = 1 << free, known = end >> free;
    const int lanes = larger(1, smaller(kTracers >> free, smaller(X::kBranches / 2, kWarp)));
    const uint32_t target = shared.target[first + step - 1];
    const uint16_t* before = shared.cost[(step - 1) % 2];
    for (int from = 0; from < count; from += kTracers / lanes) {
      const int i = from + threadIdx.x / lanes;
      uint32_t least = ~0u;  // cost, branch
      if (i < count) {
        const int node = i << (X::kNodeBits - free) | known;
#pragma unroll 4
        for (int high = 2 * (threadIdx.x % lanes); high < X::kBranches; high += 2 * lanes) {
          const int state = high << X::kNodeBits | node, next = state + X::kNodes;
          const uint32_t low_cost =
              step == 1 ? row[X::kept_place(state >> K)] : before[high * count + i];
          const uint32_t high_cost =
              step == 1 ? row[X::kept_place(next >> K)] : before[(high + 1) * count + i];
          const uint32_t sums =
              bits_of(cost_behind<K>(half2_of(high_cost << 16 | low_cost),
                                     scaled_values<K>(codebook, state, next), target));
          least = min(least, min(sums << 16 | high, (sums & 0xFFFF0000u) | (high + 1)));
        }
      }
      least = least_of_lanes(least, lanes);
      if (i < count && threadIdx.x % lanes == 0) {
        shared.cost[step % 2][i] = static_cast<uint16_t>(least >> 16);
        shared.chosen[count + i] = static_cast<uint8_t>(least);
      }
    }
  }

  // The states of a stretch that ends at `node`. Returns the node that it starts from.
  __device__ __forceinline__ int read_off(int first, int length, int node) {
    int i = 0;
    for (int step = length; step > 0; --step) {
      const int count = 1 << K * (length - step);
      const int high = shared.chosen[count + i];
      const int state = high << X::kNodeBits | node;
      if (threadIdx.x == 0) shared.state[first + step - 1] = static_cast<uint16_t>(state);
      i += high * count;
      node = state >> K;
    }
    return node;
  }
};

// Traces the slots of a round, a block each. A free path closes its circle if it passes the first
// value's node where it ends; one that does not shows a better end: the node where it passed the
// seam. Tiles that stay open are noted for a held walk.
template <int K>
__global__ void __launch_bounds__(kTracers) trace_kernel(Round round) {
  const int slot = blockIdx.x;
  if (slot >= round.slots()) return;
  const int tile = round.tile_of(slot);
  const Walk walk = walk_of<K>(round.held);
  TraceMemory<K>& memory = *dynamic_shared<TraceMemory<K>>();
  const float* target = round.tiles + int64_t(tile) * kLength;
  uint16_t* states = round.states + int64_t(tile) * kLength;
  float* values = round.values + int64_t(tile) * kLength;

  const int skipped = walk.first + walk.lead;
  for (int i = threadIdx.x; i < walk.kept; i += kTracers) {
    memory.target[i] = target_of<K>(round.codebook, target[(skipped + i) % kLength]);
  }
  __syncthreads();

  Tracer<K> tracer{round.codebook, walk, round.rows + slot * kSlot<K>, memory};
  if (round.held) {
    tracer.trace(states[(skipped + walk.kept) % kLength] >> K, false);
  } else {
    int end = tracer.cheapest();
    bool closed = false;
    for (int attempt = 0; attempt < 3 && !closed; ++attempt) {
      const int start = tracer.trace(end, attempt > 0);
      closed = start == end;
      end = start;
    }
    if (!closed && threadIdx.x == 0) round.open[atomicAdd(round.open_count, 1)] = tile;
  }

  for (int i = threadIdx.x; i < walk.kept; i += kTracers) {
    const int at = (skipped + i) % kLength;
    const uint32_t state = memory.state[i];
    states[at] = static_cast<uint16_t>(state);
    values[at] = __low2float(half2_of(values_of(round.codebook, state, state)));
  }
}

}  // namespace exl3::cuda
