// The trellis search's way back: from kept costs to the states of the cheapest path.
//
// From a node at one kept row back to the row before it, all nodes that can lead there are walked
// forward once more, now with a record of the branches that win. They double K times with every
// step back, and shrink to the one node walking forward: a small part of a step's work.
#pragma once

#include <type_traits>

#include "cuda/encode_plan.cuh"
#include "cuda/launch.hpp"

namespace exl3::cuda {

// Shared memory of a tile. Costs before a step lie in the order [node behind it][branch to that].
template <int K>
struct TraceMemory {
  static constexpr int kFirst = 1 << K * (kPlans[K].spacing - 1);  // nodes behind the first step
  alignas(16) uint16_t cost[2][kFirst << K];  // before a step and behind it
  uint32_t target[kLength];
  uint16_t state[kLength];
  uint16_t node_at[kLength + 1];  // of the path, at each kept row
  uint8_t chosen[2 * kFirst];     // the branch to each of n nodes at [n, 2 n): n tells the step
};

// The least number of all lanes.
__device__ __forceinline__ uint32_t least_of_all(uint32_t x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_min_sync(0xFFFFFFFFu, x);
#else
  for (int mask = 1; mask < kWarp; mask *= 2) x = min(x, from_lane_xor(x, mask));
  return x;
#endif
}

// A warp that traces one tile. All its lanes call everything and get the same results. With few
// tiles nothing hides what a lane waits for, so loops are unrolled and loads stand before them.
template <int K, Kind kKind>
struct Tracer {
  using X = Trellis<K>;
  static constexpr int kSpacing = kPlans[K].spacing;
  const Mix mix;
  const Walk walk;
  const uint16_t* rows;
  TraceMemory<K>& shared;
  const int lane;  // known to be less than kTracers

  // The cheapest node of the last row, of several the one whose place is first.
  __device__ int cheapest() const {
    const auto* units =
        reinterpret_cast<const uint4*>(rows + walk.kept / kSpacing * X::kNodes);
    uint32_t least = ~0u;  // cost, place
#pragma unroll 4
    for (int unit = lane; unit < X::kNodes / 8; unit += kTracers) {
      const uint4 costs = units[unit];
      const uint32_t words[4] = {costs.x, costs.y, costs.z, costs.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t place = 8 * unit + 2 * i;
        least = min(least, min(words[i] << 16 | place, (words[i] & 0xFFFF0000u) | (place + 1)));
      }
    }
    return X::node_at(least_of_all(least) & 0xFFFF);
  }

  // Follows the cheapest path back from `end`. If it joins the path of an earlier call it leads
  // on like that one, which saves the rest. Returns the node it starts from.
  __device__ int trace(int end, bool again) {
    int node = end;
    for (int row = walk.kept / kSpacing - 1; row >= 0; --row) {
      gather(rows + row * X::kNodes, node);
      __syncthreads();
      const int last = widen(std::integral_constant<int, 1>(), row * kSpacing, node);
      node = read_off(row * kSpacing, last, node);
      const bool joined = again && shared.node_at[row] == node;
      __syncthreads();
      if (joined) return shared.node_at[0];
      if (lane == 0) shared.node_at[row] = static_cast<uint16_t>(node);
    }
    __syncthreads();
    return node;
  }

 private:
  // A node that `end` can be reached from in `steps` steps, by the bits that it leaves free.
  static __device__ __forceinline__ int node_before(int end, int steps, int free) {
    return free << (X::kNodeBits - K * steps) | end >> K * steps;
  }

  // The costs of a kept row from which `end` can be reached.
  __device__ __forceinline__ void gather(const uint16_t* row, int end) {
    if constexpr (X::kGathered) {  // those of all branches to a node stand together
      constexpr int kUnits = X::kBranches / 8, kAll = TraceMemory<K>::kFirst * kUnits;
      static_assert(kAll <= kTracers);
      if (lane < kAll) {
        const int node = node_before(end, kSpacing - 1, lane / kUnits);
        const int place = swizzled((node >> K) * X::kBranches + lane % kUnits * 8);
        reinterpret_cast<uint4*>(shared.cost[0])[lane] =
            *reinterpret_cast<const uint4*>(row + place);
      }
    } else {
      constexpr int kOwn = (TraceMemory<K>::kFirst << K) / kTracers;
      uint16_t costs[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int at = lane + i * kTracers, high = at % X::kBranches;
        const int node = node_before(end, kSpacing - 1, at / X::kBranches);
        costs[i] = row[X::place((high << X::kNodeBits | node) >> K)];
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i) shared.cost[0][lane + i * kTracers] = costs[i];
    }
  }

  // Steps from `step` on that lead to `end`: the cheapest branch to each node from which it can be
  // reached. Where they are few, lanes share the branches of one. Returns the last branch.
  template <int kStep>
  __device__ __forceinline__ int widen(std::integral_constant<int, kStep>, int first, int end) {
    constexpr int kAfter = kSpacing - kStep, kCount = 1 << K * kAfter;
    constexpr int kLanes = smaller(larger(1, kTracers / kCount), X::kBranches / 2);
    const uint32_t target = shared.target[first + kStep - 1];
    const uint16_t* before = shared.cost[(kStep - 1) % 2];
    uint32_t least;  // cost, branch
#pragma unroll
    for (int from = 0; from < kCount; from += kTracers / kLanes) {
      const int i = from + lane / kLanes;
      least = ~0u;
      if (i < kCount) {
        const int node = node_before(end, kAfter, i);
#pragma unroll
        for (int n = 0; n < X::kBranches / 2; n += kLanes) {
          const int high = 2 * (n + lane % kLanes), state = high << X::kNodeBits | node;
          const auto costs = *reinterpret_cast<const uint32_t*>(before + i * X::kBranches + high);
          const __half2 values = scaled<K>(values_of<kKind>(mix, state, state + X::kNodes));
          const uint32_t sums = bits_of(cost_behind<K>(half2_of(costs), values, target));
          least = min(least, min(sums << 16 | high, (sums & 0xFFFF0000u) | (high + 1)));
        }
      }
      if constexpr (kAfter > 0) {
#pragma unroll
        for (int mask = 1; mask < kLanes; mask *= 2) {
          least = min(least, from_lane_xor(least, mask));
        }
        if (i < kCount && lane % kLanes == 0) {
          constexpr int kNext = kCount >> K;  // nodes behind the next step
          shared.cost[kStep % 2][i % kNext * X::kBranches + i / kNext] =
              static_cast<uint16_t>(least >> 16);
          shared.chosen[kCount + i] = static_cast<uint8_t>(least);
        }
      }
    }
    if constexpr (kAfter > 0) {
      __syncthreads();
      return widen(std::integral_constant<int, kStep + 1>(), first, end);
    } else {
      return least_of_all(least) & 0xFF;
    }
  }

  // The states of a stretch that ends at `node` by the branch `high`. Returns the node that it
  // starts from.
  __device__ __forceinline__ int read_off(int first, int high, int node) {
    int i = 0;
#pragma unroll
    for (int step = kSpacing; step > 0; --step) {
      const int count = 1 << K * (kSpacing - step);
      if (step < kSpacing) high = shared.chosen[count + i];
      const int state = high << X::kNodeBits | node;
      if (lane == 0) shared.state[first + step - 1] = static_cast<uint16_t>(state);
      i += high * count;
      node = state >> K;
    }
    return node;
  }
};

// Traces the slots of a round, a block each. A free path closes its circle if it passes the first
// value's node where it ends; one that does not shows a better end: the node where it passed the
// seam. Tiles that stay open are noted for a held walk.
template <int K, Kind kKind>
__global__ void __launch_bounds__(kTracers) trace_kernel(Round round) {
  const int lane = threadIdx.x % kTracers;
  const int slot = blockIdx.x;
  if (slot >= round.slots()) return;
  const int tile = round.tile_of(slot);
  const Walk walk = walk_of<K>(round.held);
  TraceMemory<K>& memory = *dynamic_shared<TraceMemory<K>>();
  const float* target = round.tiles + int64_t(tile) * kLength;
  uint16_t* states = round.states + int64_t(tile) * kLength;
  float* values = round.values + int64_t(tile) * kLength;

  const int skipped = walk.first + walk.lead;
  for (int i = lane; i < walk.kept; i += kTracers) {
    memory.target[i] = target_of<K>(round.codebook, target[(skipped + i) % kLength]);
  }
  __syncthreads();

  Tracer<K, kKind> tracer{round.codebook.mix, walk, round.rows + slot * kSlot<K>, memory, lane};
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
    if (!closed && lane == 0) round.open[atomicAdd(round.open_count, 1)] = tile;
  }

  for (int i = lane; i < walk.kept; i += kTracers) {
    const int at = (skipped + i) % kLength;
    const uint32_t state = memory.state[i];
    states[at] = static_cast<uint16_t>(state);
    values[at] = __low2float(half2_of(values_of<kKind>(round.codebook.mix, state, state)));
  }
}

}  // namespace exl3::cuda
