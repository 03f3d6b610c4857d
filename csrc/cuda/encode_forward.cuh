// The trellis search forward: costs of all nodes, step by step, for a few tiles in a block.
//
// Every thread has the same 128 states at every step, so their values stay in its registers. Costs
// of nodes are float16 numbers in shared memory. A branch pair, two neighbouring states, takes
// three instructions: subtract, multiply-add, minimum. Which branch won is not recorded: costs
// are copied to global memory every few steps, from where encode_trace.cuh finds the way back.
#pragma once

#include "cuda/encode_plan.cuh"
#include "cuda/launch.hpp"

namespace exl3::cuda {

// One thread of a block.
template <int K>
struct Searcher {
  using X = Trellis<K>;
  static constexpr int kLoaded = X::kOwn * X::kHighs;  // costs that a step reads

  uint32_t value[64];  // pairs of values, as float16, [own group][high][pair]
  int first_node;      // that it finds the cost of
  int part;            // which of the kSplit lanes it is
  int loaded, stored;  // bytes from a row's start to the first costs that it reads and writes

  __device__ __forceinline__ Searcher(const Codebook& codebook, int thread) {
    part = thread % X::kSplit;
    const int rest = thread / X::kSplit;
    int group, pair = 0;
    if constexpr (!X::kGathered) {
      group = rest * X::kOwn;
    } else {
      constexpr int kSharing = X::kBranches / 2 / X::kPairs;  // sets of kSplit lanes, of a group
      pair = rest % kSharing * X::kPairs;
      group = rest / kSharing;
      // Lanes of a warp take distant groups at 4 bits: fewer bank conflicts.
      if constexpr (K == 4) group = (group & 15) << 4 | group >> 4;
    }
    const int first_high = part * X::kHighs;
    first_node = group * X::kBranches + 2 * pair;
    loaded = 2 * (X::kGathered ? swizzled(group * X::kBranches + first_high) : X::place(group));
    stored = 2 * X::place(X::kSplit == 1 ? first_node : first_node + part % 2);
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int p = i % X::kPairs, h = i / X::kPairs % X::kHighs, own = i / X::kPairs / X::kHighs;
      const int state =
          (first_high + h) * X::kNodes + first_node + own * X::kBranches + 2 * p;
      value[i] = bits_of(scaled<K>(values_of(codebook, state, state + 1)));
    }
  }

  // Costs of the nodes it needs, two a word, [high][own group]. `row`: where the row starts in
  // shared memory. Rows start at multiples of their size, a power of two, and places differ from
  // the first one in bits that are 0 there, so one XOR gives an address.
  __device__ __forceinline__ void load(char* memory, int row,
                                       uint32_t (&before)[kLoaded / 2]) const {
    constexpr int kRun = X::kGathered ? X::kHighs : X::kOwn;  // that stand together
#pragma unroll
    for (int i = 0; i < kLoaded; i += smaller(kRun, 8)) {
      const int place = swizzled(X::kGathered ? i : i / kRun * X::kGroups + i % kRun);
      const char* from = memory + ((row + loaded) ^ 2 * place);
      if constexpr (kRun == 2) {
        before[i / 2] = *reinterpret_cast<const uint32_t*>(from);
      } else {
        const uint4 unit = *reinterpret_cast<const uint4*>(from);
        before[i / 2] = unit.x;
        before[i / 2 + 1] = unit.y;
        before[i / 2 + 2] = unit.z;
        before[i / 2 + 3] = unit.w;
      }
    }
  }

  // The cheapest ways to the nodes that group `own` leads to.
  __device__ __forceinline__ void minima(const uint32_t (&before)[kLoaded / 2], uint32_t target,
                                         int own, __half2 (&best)[X::kPairs]) const {
#pragma unroll
    for (int h = 0; h < X::kHighs; ++h) {
      const int i = h * X::kOwn + own;
      const __half2 two = half2_of(before[i / 2]);
      const __half2 cost = i % 2 == 0 ? __low2half2(two) : __high2half2(two);
#pragma unroll
      for (int p = 0; p < X::kPairs; ++p) {
        const __half2 v = half2_of(value[(own * X::kHighs + h) * X::kPairs + p]);
        const __half2 sum = cost_behind<K>(cost, v, target);
        best[p] = h == 0 ? sum : __hmin2(best[p], sum);
      }
    }
#pragma unroll
    for (int mask = 1; mask < X::kSplit; mask *= 2) {
#pragma unroll
      for (int p = 0; p < X::kPairs; ++p) {
        best[p] = __hmin2(best[p], half2_of(from_lane_xor(bits_of(best[p]), mask)));
      }
    }
  }

  // Words of costs of neighbouring nodes, from first_node + 2 * number on, to the row of shared
  // memory that starts at `row`.
  template <int kWords>
  __device__ __forceinline__ void store(const uint32_t (&word)[kWords], int number, char* memory,
                                        int row) const {
    const int first = row + stored;
    if constexpr (!X::kGathered) {
      static_assert(kWords == 4);
      *reinterpret_cast<uint4*>(memory + (first ^ 2 * X::place(2 * number))) =
          make_uint4(word[0], word[1], word[2], word[3]);
    } else if constexpr (X::kSplit == 1) {
#pragma unroll
      for (int i = 0; i < 2 * kWords; ++i) {
        *reinterpret_cast<uint16_t*>(memory + (first ^ 2 * X::place(i))) =
            static_cast<uint16_t>(word[i / 2] >> 16 * (i % 2));
      }
    } else if (part < 2) {  // the lanes that share the pair have the same word: two store it
      *reinterpret_cast<uint16_t*>(memory + first) = static_cast<uint16_t>(word[0] >> (16 * part));
    }
  }

  // One step of one tile: costs at `in`, before the value `target` -> costs at `out`, behind it.
  // With kLower they are lowered by `amount`, and the least that this thread has found is returned.
  template <bool kLower>
  __device__ __forceinline__ __half2 step(char* memory, int in, int out, uint32_t target,
                                          __half2 amount) const {
    uint32_t before[kLoaded / 2];
    load(memory, in, before);
    if constexpr (X::kInPlace) __syncthreads();
    constexpr int kWords = X::kGathered ? X::kPairs : 4;  // stored together
    constexpr int kTogether = kWords / X::kPairs;         // groups that give them
    __half2 least = half2_of(kInfinity << 16 | kInfinity);
#pragma unroll
    for (int own = 0; own < X::kOwn; own += kTogether) {
      uint32_t word[kWords];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        __half2 best[X::kPairs];
        minima(before, target, own + i, best);
#pragma unroll
        for (int p = 0; p < X::kPairs; ++p) {
          if constexpr (kLower) {
            best[p] = __hsub2(best[p], amount);
            least = __hmin2(least, best[p]);
          }
          word[i * X::kPairs + p] = bits_of(best[p]);
        }
      }
      store(word, own * X::kPairs, memory, out);
    }
    return least;
  }
};

// Copies a row of costs from shared memory to a kept row.
template <int K>
__device__ __forceinline__ void keep(const char* costs, uint16_t* row) {
  const auto* from = reinterpret_cast<const uint4*>(costs);
  auto* to = reinterpret_cast<uint4*>(row);
#pragma unroll 2
  for (int i = threadIdx.x; i < Trellis<K>::kNodes / 8; i += kSearchers) to[i] = from[i];
}

// Costs are never negative, so as float16 they are ordered like their bits.
__device__ __forceinline__ uint32_t least_of_warp(__half2 two) {
  const uint32_t bits = bits_of(__hmin2(two, __lowhigh2highlow(two)));
  uint32_t least = bits & 0xFFFF;
#pragma unroll
  for (int mask = 1; mask < kWarp; mask *= 2) least = min(least, from_lane_xor(least, mask));
  return least;
}

// Shared memory of a block, for each of its tiles: costs, then targets, then the least cost.
template <int K>
constexpr size_t forward_bytes(int tiles) {
  return tiles * (size_t(Trellis<K>::kBuffers) * Trellis<K>::kNodes * sizeof(uint16_t) +
                  (kPlans[K].lead + kLength) * sizeof(uint32_t) + sizeof(uint32_t));
}

// The costs that a walk starts from.
template <int K>
__device__ __forceinline__ void start_costs(const Round& round, int tile, int first,
                                            uint16_t* costs) {
  using X = Trellis<K>;
  const int start = round.held ? round.states[int64_t(tile) * kLength + first] >> K : -1;
  for (int node = threadIdx.x; node < X::kNodes; node += kSearchers) {
    costs[X::place(node)] = start < 0 || node == start ? 0 : kInfinity;
  }
}

// Walks the slots of a round, `together` of them a block. Costs are lowered by their least now and
// then, one step after it has been found: float16 is finest near zero.
template <int K>
__global__ void __launch_bounds__(kSearchers, 1) forward_kernel(Round round, int together) {
  using X = Trellis<K>;
  const int thread = threadIdx.x;
  const int first_slot = blockIdx.x * together;
  const int tiles = min(together, round.slots() - first_slot);
  if (tiles <= 0) return;
  const Walk walk = walk_of<K>(round.held);

  constexpr int kRowBytes = X::kNodes * sizeof(uint16_t), kTileBytes = X::kBuffers * kRowBytes;
  char* memory = dynamic_shared<char>();
  uint32_t* targets = reinterpret_cast<uint32_t*>(memory + together * kTileBytes);
  uint32_t* least = targets + together * (kPlans[K].lead + kLength);
  uint16_t* rows = round.rows + first_slot * kSlot<K>;

  for (int t = 0; t < tiles; ++t) {
    const int tile = round.tile_of(first_slot + t);
    start_costs<K>(round, tile, walk.first, reinterpret_cast<uint16_t*>(memory + t * kTileBytes));
    for (int i = thread; i < walk.steps(); i += kSearchers) {
      const float value = round.tiles[int64_t(tile) * kLength + (walk.first + i) % kLength];
      targets[t * walk.steps() + i] = target_of<K>(round.codebook, value);
    }
    if (thread == 0) least[t] = kInfinity;
  }
  const Searcher<K> searcher(round.codebook, thread);
  __syncthreads();

  for (int step = 0; step <= walk.steps(); ++step) {
    const int in = X::kInPlace ? 0 : step % 2 * kRowBytes;
    const int out = X::kInPlace ? 0 : kRowBytes - in;
    const int kept = step - walk.lead;
    if (kept >= 0 && kept % kPlans[K].spacing == 0) {
      uint16_t* row = rows + kept / kPlans[K].spacing * X::kNodes;
      for (int t = 0; t < tiles; ++t) keep<K>(memory + t * kTileBytes + in, row + t * kSlot<K>);
    }
    if (step == walk.steps()) break;
    const bool find = step % kLowering == kLowering - 1;
    const bool lower = step % kLowering == 0 && step > 0;
#pragma unroll 1
    for (int t = 0; t < tiles; ++t) {
      const uint32_t target = targets[t * walk.steps() + step];
      const int tile_in = t * kTileBytes + in, tile_out = t * kTileBytes + out;
      if (!find && !lower) {
        searcher.template step<false>(memory, tile_in, tile_out, target, __half2());
        continue;
      }
      const __half2 amount = half2_of((lower ? least[t] : 0) * 0x10001u);
      const __half2 found =
          searcher.template step<true>(memory, tile_in, tile_out, target, amount);
      if (find) {
        const uint32_t least_found = least_of_warp(found);
        if (thread % kWarp == 0) atomicMin(least + t, least_found);
      }
    }
    __syncthreads();
    if (lower && thread < tiles) least[thread] = kInfinity;
  }
}

}  // namespace exl3::cuda
