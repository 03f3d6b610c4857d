// The trellis search on a GPU, which docs/kernels.md explains: its numbers, and what its kernels
// share.
#pragma once

#include "cuda/codebook.cuh"

namespace exl3::cuda {

constexpr int kLength = 256;     // values of a tile
constexpr int kSearchers = 512;  // threads of a block that walk forward
constexpr int kTracers = kWarp;  // that find a tile's way back: waiting for each other costs most
constexpr int kLowering = 16;    // steps from one lowering of the costs to the next

// How the search is done at each number of bits. These numbers define its result.
struct Plan {
  float clamp;  // tiles are clamped to so many times the codebook's greatest magnitude
  float scale;  // of values and tiles, a power of two: keeps squares of small errors normal numbers
  bool fine;    // float16 is too coarse for the tile: what it lacks is subtracted as well
  int lead;     // steps walked before the first value, round the circle, to forget the free start
  int spacing;  // costs are kept every so many steps, a power of two
  int reach;    // an open seam is closed by a second search of so many values on either side
};

constexpr Plan kPlans[9] = {
    {},
    {1.40f, 1, false, 96, 8, 96},
    {1.25f, 1, false, 96, 4, 64},
    {1.15f, 2, false, 80, 2, 64},
    {1.20f, 2, false, 96, 2, 32},
    {1.30f, 4, false, 96, 1, 32},
    {1.20f, 4, false, 64, 1, 32},
    {1.08f, 8, false, 64, 1, 32},
    {1.05f, 16, true, 64, 1, 32},
};

constexpr __host__ __device__ int smaller(int a, int b) { return a < b ? a : b; }
constexpr __host__ __device__ int larger(int a, int b) { return a > b ? a : b; }

// Shared memory is read in units of 16 bytes, eight costs. Which of the 128 bytes of all banks a
// unit takes is mixed with the unit's number above them, so that strides of powers of two, which
// are all there are here, fall into different banks. Linear: swizzled(a ^ b) is the XOR of both.
constexpr __host__ __device__ int swizzled(int place) {
  return place ^ (place >> 6 & 7) << 3;
}

// A node is what two neighbouring states share, 16 - K bits; state = high << (16 - K) | node leads
// from node state >> K to `node`. The nodes high * kGroups + group (any high) lead to the nodes
// group * kBranches + low (any low), and to no others.
template <int K>
struct Trellis {
  static constexpr Plan plan = kPlans[K];
  static constexpr int kNodeBits = 16 - K;
  static constexpr int kNodes = 1 << kNodeBits;
  static constexpr int kBranches = 1 << K;  // into and out of a node
  static constexpr int kGroups = kNodes / kBranches;

  // A thread's 128 states, the same at every step: of kOwn neighbouring groups, kHighs nodes that
  // lead to 2 * kPairs neighbouring nodes. kSplit neighbouring lanes share the latter.
  static constexpr int kHighs = smaller(kBranches, 64);
  static constexpr int kSplit = kBranches / kHighs;
  static constexpr int kOwn = K <= 3 ? 128 / (kBranches * kBranches) : 1;
  static constexpr int kPairs = 64 / (kOwn * kHighs);
  static_assert(kOwn * kHighs * kPairs == 64);

  // Costs of nodes in shared memory: from 4 bits on, those that a thread reads stand together.
  static constexpr bool kGathered = K >= 4;
  static constexpr __host__ __device__ int place(int node) {
    if (kGathered) node = (node % kGroups) * kBranches + node / kGroups;
    return swizzled(node);
  }
  static constexpr __host__ __device__ int node_at(int place) {
    const int node = swizzled(place);  // which is its own inverse
    return kGathered ? (node % kBranches) * kGroups + node / kBranches : node;
  }
  // With 1 bit, costs after a step take the place of those before it, for lack of room.
  static constexpr bool kInPlace = K == 1;
  static constexpr int kBuffers = kInPlace ? 1 : 2;
};

// One walk along the values of a tile.
struct Walk {
  int first;  // its first value
  int lead;   // steps before costs are kept
  int kept;   // steps after that

  constexpr __host__ __device__ int steps() const { return lead + kept; }
};

// The free walk starts anywhere, before the tile's first value; the held one leads from a node of
// the path found to a later one, across the seam between the last value and the first.
template <int K>
constexpr __host__ __device__ Walk walk_of(bool held) {
  constexpr Plan plan = kPlans[K];
  static_assert(kLength % plan.spacing == 0 && 2 * plan.reach % plan.spacing == 0);
  return held ? Walk{kLength - plan.reach, 0, 2 * plan.reach}
              : Walk{(kLength - plan.lead) % kLength, plan.lead, kLength};
}

// Kept rows of costs, as they lie in shared memory: one before the first kept step, one behind every
// `spacing` of them.
template <int K>
constexpr int64_t kSlot = int64_t(kLength / kPlans[K].spacing + 1) * Trellis<K>::kNodes;

// One round of a search: some of the call's tiles, each with a slot for its kept rows.
struct Round {
  Codebook codebook;
  const float* tiles;  // all of the call
  uint16_t* states;
  float* values;
  uint16_t* rows;   // kept rows: float16 costs
  int32_t* open;    // tiles whose seam is open, `*open_count` of them
  int32_t* open_count;
  int32_t first, count;  // of the tiles; of the open ones if `held`
  bool held;

  __device__ __forceinline__ int slots() const {
    return held ? min(count, *open_count - first) : count;
  }
  __device__ __forceinline__ int tile_of(int slot) const {
    return held ? open[first + slot] : first + slot;
  }
};

// A tile's value as the kernels read it: as float16 and, in the high half, what that lacks.
template <int K>
__device__ __forceinline__ uint32_t target_of(const Codebook& codebook, float value) {
  constexpr Plan plan = kPlans[K];
  const float limit = plan.clamp * codebook.largest;
  const float scaled = fminf(fmaxf(value, -limit), limit) * plan.scale;
  const __half near = __float2half_rn(scaled);
  return bits_of(__halves2half2(near, __float2half_rn(scaled - __half2float(near))));
}

// Values of two states in the search's scale: exact, the scale is a power of two.
template <int K>
__device__ __forceinline__ __half2 scaled(uint32_t values) {
  return __hmul2(half2_of(values), __float2half2_rn(kPlans[K].scale));
}

// Costs behind two branches.
template <int K>
__device__ __forceinline__ __half2 cost_behind(__half2 cost, __half2 value, uint32_t target) {
  __half2 error = __hsub2(value, __low2half2(half2_of(target)));
  if constexpr (kPlans[K].fine) error = __hsub2(error, __high2half2(half2_of(target)));
  return __hfma2(error, error, cost);
}

constexpr uint32_t kInfinity = 0x7C00;  // as float16

}  // namespace exl3::cuda
