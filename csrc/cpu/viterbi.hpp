// The tail-biting Viterbi search over 2^16 states, written once for every instruction set.
//
// Included only by encode_<isa>.cpp, each of which compiles it with its own instructions for its
// own `V`, a class of vector operations. Everything here has internal linkage, and no function of
// the standard library is called, so that no AVX code can end up in a function that others share.
//
// Costs are unsigned 16-bit integers, so 16 branches of the trellis take four AVX2 instructions
// (subtract, rounding square, saturating add, minimum). Arithmetic on integers does not depend on
// the order, so every instruction set finds the same costs.
//
// Which branch won is not recorded. Costs are kept every few steps (Plan::spacing) and the way
// back finds the branches again: those whose costs add up exactly.
//
// The circle is closed lazily. A free search walks Plan::lead steps before the first value, then
// all 256. The path found is optimal for its seam if it passes the first value's node where it
// ends; nearly all do. For the few others a second search is held to one node at both ends.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/encode.hpp"
#include "cpu/plan.hpp"

#if defined(_MSC_VER)
#define EXL3_INLINE __forceinline
#define EXL3_NOINLINE __declspec(noinline)
#else
#define EXL3_INLINE inline __attribute__((always_inline))
#define EXL3_NOINLINE __attribute__((noinline))
#endif
// Loops over a handful of registers must vanish.
#if defined(__clang__)
#define EXL3_UNROLL _Pragma("unroll")
#define EXL3_UNROLL_SOME _Pragma("unroll 8")
#elif defined(__GNUC__)
#define EXL3_UNROLL _Pragma("GCC unroll 64")
#define EXL3_UNROLL_SOME _Pragma("GCC unroll 8")
#else
#define EXL3_UNROLL
#define EXL3_UNROLL_SOME
#endif

namespace exl3 {
namespace {

constexpr int smaller(int a, int b) { return a < b ? a : b; }

// Sizes and memory layout at one number of bits.
template <int K>
struct Trellis {
  static constexpr Plan plan = kPlans[K];
  static constexpr int node_bits = 16 - K;
  static constexpr int nodes = 1 << node_bits;
  static constexpr int branches = 1 << K;  // in and out of a node
  // The `branches` nodes that lead to the same `branches` nodes are `groups` apart.
  static constexpr int groups = nodes / branches;
  // A row holds the cost of every node. A step reads it at distances of `groups`, powers of two
  // that fall into the same few cache sets; padding spreads them (worth 2.5 times at 4 bits).
  static constexpr int pad = K <= 4 ? 96 : 0;
  static constexpr int row = nodes + branches * pad + (K <= 4 ? 0 : 32);
  static constexpr int at(int node) { return node + node / groups * pad; }

  static constexpr int kept = kTileLength / plan.spacing;  // rows kept beyond the first
  static_assert(kTileLength % plan.spacing == 0 && plan.lead % plan.spacing == 0);
};

// Costs this high at a kept row are lowered; leaves room for the steps up to the next one.
constexpr int kLower = 8192;
constexpr int kSaturated = 0xFFFF;

// The search of one tile under way.
template <int K>
struct Track {
  using X = Trellis<K>;
  alignas(64) int16_t target[X::plan.lead + kTileLength];  // the tile's values, from the lead on
  int cheapest[X::kept + 1];                               // least cost of each kept row
  int lowered[X::kept + 1];                                // by how much the row has been lowered
  alignas(64) uint16_t rows[X::kept + 1][X::row];          // costs before the first value, and kept
  alignas(64) uint16_t scratch[2][X::row];                 // costs between kept rows
  char apart[192];  // tiles side by side do not start at the same place of a page
};

template <class V, int K>
struct Search {
  using X = Trellis<K>;
  using Vec = typename V::Vec;
  static constexpr Plan plan = X::plan;

  // Two ways to fill a vector. Where a node has enough successors, they are its lanes, and the
  // node's cost is broadcast to them. Where not, its lanes are neighbouring groups: one load of
  // costs serves all successors, and zips bring the results back into the order of nodes.
  static constexpr bool lanes_are_groups = X::branches < V::lanes;
  static constexpr int vectors = lanes_are_groups ? X::branches : X::branches / V::lanes;
  static constexpr int unrolled = smaller(vectors, V::unroll);  // results held in registers
  static constexpr int stride = lanes_are_groups ? V::lanes : 1;

  // Calls visit(previous node of lane 0, number of the vector) in the order of the forward step.
  template <class Visit>
  static void each_vector(Visit visit) {
    for (int group = 0; group < X::groups; group += stride)
      for (int first = 0; first < vectors; first += unrolled)
        for (int high = 0; high < X::branches; ++high)
          for (int v = first; v < first + unrolled; ++v) visit(high * X::groups + group, v);
  }

  // Puts values by state into the order in which the forward step reads them.
  static void arrange(const int16_t* by_state, int16_t* in_order) {
    each_vector([&](int previous, int v) {
      for (int lane = 0; lane < V::lanes; ++lane) {
        *in_order++ = lanes_are_groups ? by_state[(previous + lane) * X::branches + v]
                                       : by_state[previous * X::branches + v * V::lanes + lane];
      }
    });
  }

  static EXL3_INLINE Vec squared_error(const Vec& value, const Vec& target) {
    return V::rounded_product(V::template difference<plan.doublings>(value, target),
                              V::template difference<plan.tail_doublings>(value, target));
  }

  static EXL3_INLINE int saturated(int x) { return x > 32767 ? 32767 : x < -32768 ? -32768 : x; }

  // The same for one branch.
  static EXL3_INLINE int squared_error(int value, int target) {
    const int large = saturated((value - target) * (1 << plan.doublings));
    const int small = saturated((value - target) * (1 << plan.tail_doublings));
    return (large * small + (1 << 14)) >> 15;
  }

  // The branches from node `high * groups + group` and its neighbours, into `best`.
  template <int T, bool first>
  static EXL3_INLINE void take_branches(const int16_t* values, const Vec (&target)[T],
                                        const uint16_t* const (&in)[T], int high, int group,
                                        Vec (&best)[T][unrolled]) {
    Vec cost[T];
    EXL3_UNROLL
    for (int t = 0; t < T; ++t) {
      const uint16_t* previous = in[t] + high * (X::groups + X::pad) + group;
      cost[t] = lanes_are_groups ? V::load(previous) : V::broadcast(*previous);
    }
    EXL3_UNROLL
    for (int u = 0; u < unrolled; ++u) {
      const Vec value = V::load_values(values + u * V::lanes);
      EXL3_UNROLL
      for (int t = 0; t < T; ++t) {
        const Vec sum = V::add(cost[t], squared_error(value, target[t]));
        best[t][u] = first ? sum : V::minimum(best[t][u], sum);
      }
    }
  }

  // One vector of costs per successor, lanes = groups, into the order of nodes. Each round of zips
  // rotates the bits of an element's place (vector, lane) by one; after K rounds the vector's
  // number, which is the low bits of the node, stands lowest.
  static EXL3_INLINE void interleave(Vec (&costs)[vectors]) {
    EXL3_UNROLL
    for (int round = 0; round < K; ++round) {
      Vec zipped[vectors];
      EXL3_UNROLL
      for (int i = 0; i < vectors / 2; ++i)
        V::zip(costs[i], costs[i + vectors / 2], zipped[2 * i], zipped[2 * i + 1]);
      EXL3_UNROLL
      for (int i = 0; i < vectors; ++i) costs[i] = zipped[i];
    }
  }

  // One value of each of T tiles: costs `in` of the nodes before it -> costs `out` after it. The
  // tiles share the loads of the codebook. `least`: the least cost of each tile, if asked for.
  template <int T, bool find_least>
  static EXL3_NOINLINE void step(const int16_t* values, const int16_t* const (&target)[T],
                                 const uint16_t* const (&in)[T], uint16_t* const (&out)[T],
                                 int (&least)[T]) {
    Vec wanted[T], low[T];
    EXL3_UNROLL
    for (int t = 0; t < T; ++t) {
      wanted[t] = V::broadcast(*target[t]);
      low[t] = V::broadcast(kSaturated);
    }
    for (int group = 0; group < X::groups; group += stride) {
      Vec costs[T][vectors];
      EXL3_UNROLL
      for (int first = 0; first < vectors; first += unrolled) {
        Vec best[T][unrolled];
        take_branches<T, true>(values, wanted, in, 0, group, best);
        values += unrolled * V::lanes;
        EXL3_UNROLL_SOME
        for (int high = 1; high < X::branches; ++high, values += unrolled * V::lanes)
          take_branches<T, false>(values, wanted, in, high, group, best);
        EXL3_UNROLL
        for (int t = 0; t < T; ++t)
          EXL3_UNROLL
          for (int u = 0; u < unrolled; ++u) costs[t][first + u] = best[t][u];
      }
      EXL3_UNROLL
      for (int t = 0; t < T; ++t) {
        if constexpr (lanes_are_groups) interleave(costs[t]);
        EXL3_UNROLL
        for (int v = 0; v < vectors; ++v) {
          V::store(out[t] + X::at(group * X::branches + v * V::lanes), costs[t][v]);
          if (find_least) low[t] = V::minimum(low[t], costs[t][v]);
        }
      }
    }
    if (find_least) {
      for (int t = 0; t < T; ++t) least[t] = least_lane(low[t]);
    }
  }

  static int least_lane(const Vec& vec) {
    alignas(64) uint16_t lane[V::lanes];
    V::store(lane, vec);
    int least = kSaturated;
    for (int i = 0; i < V::lanes; ++i) least = smaller(least, lane[i]);
    return least;
  }

  static void lower(uint16_t* row, int amount) {
    const Vec by = V::broadcast(amount);
    for (int i = 0; i < X::row; i += V::lanes)
      V::store(row + i, V::lowered(V::load(row + i), by));
  }

  // Walks T tracks over their targets, `lead` steps and then all values. Their first row is set:
  // scratch[0] if there is a lead, else rows[0].
  template <int T>
  static void forward(const SearchTables& tables, Track<K>* tracks, int lead) {
    const int16_t* target[T];
    const uint16_t* in[T];
    uint16_t* out[T];
    int least[T];
    for (int t = 0; t < T; ++t) {
      tracks[t].cheapest[0] = tracks[t].lowered[0] = 0;
      in[t] = lead > 0 ? tracks[t].scratch[0] : tracks[t].rows[0];
    }
    for (int done = 1; done <= lead + kTileLength; ++done) {
      const bool whole = done % plan.spacing == 0;
      const int kept = whole && done >= lead ? (done - lead) / plan.spacing : -1;
      for (int t = 0; t < T; ++t) {
        target[t] = tracks[t].target + done - 1;
        out[t] = kept >= 0 ? tracks[t].rows[kept] : tracks[t].scratch[done % 2];
      }
      if (whole) {
        step<T, true>(tables.in_order, target, in, out, least);
      } else {
        step<T, false>(tables.in_order, target, in, out, least);
      }
      for (int t = 0; t < T; ++t) {
        in[t] = out[t];
        if (!whole) continue;
        const int amount = least[t] >= kLower ? least[t] : 0;
        if (amount > 0) lower(out[t], amount);
        if (kept < 0) continue;
        tracks[t].cheapest[kept] = least[t] - amount;
        tracks[t].lowered[kept] = amount;
      }
    }
  }

  // `way_back` over one value where the successors fill vectors: the high bits of a state that
  // leads to `node` from a node of `row` at exactly `cost`, or -1.
  static int way_back_one(const int16_t* values, int target, const uint16_t* row, int node,
                          int cost) {
    alignas(64) uint16_t sums[X::branches];
    for (int high = 0; high < X::branches; ++high)
      sums[high] = row[X::at(high * X::groups + (node >> K))];
    const Vec wanted = V::broadcast(target);
    for (int i = 0; i < X::branches; i += V::lanes) {
      const Vec error = squared_error(V::load_values(values + i), wanted);
      V::store(sums + i, V::add(V::load(sums + i), error));
    }
    for (int high = 0; high < X::branches; ++high)
      if (sums[high] == cost) return high;
    return -1;
  }

  // Finds states of the values first..last that lead from a node of `row` to `node` and cost,
  // together with the node they leave from, exactly `cost`. No node of `row` costs less than
  // `least`, which prunes nearly all branches.
  static bool way_back(const SearchTables& tables, const int16_t* target, const uint16_t* row,
                       int least, int first, int last, int node, int cost, uint16_t* states) {
    const int16_t* values = tables.by_node + node * X::branches;
    if constexpr (plan.spacing == 1 && !lanes_are_groups) {
      const int high = way_back_one(values, target[last], row, node, cost);
      states[last] = static_cast<uint16_t>(high << X::node_bits | node);
      return high >= 0;
    }
    for (int high = 0; high < X::branches; ++high) {
      const int before = cost - squared_error(values[high], target[last]);
      if (before < least) continue;
      const int state = high << X::node_bits | node;
      const int previous = state >> K;
      if (last == first ? row[X::at(previous)] == before
                        : way_back(tables, target, row, least, first, last - 1, previous, before,
                                   states)) {
        states[last] = static_cast<uint16_t>(state);
        return true;
      }
    }
    return false;
  }

  // The cheapest path of a track that ends at `node`. Returns the node that it starts from.
  static int trace(const SearchTables& tables, const Track<K>& track, const int16_t* target,
                   int node, uint16_t* states) {
    for (int kept = X::kept; kept > 0; --kept) {
      const int last = kept * plan.spacing - 1, first = last + 1 - plan.spacing;
      const int cost = track.rows[kept][X::at(node)] + track.lowered[kept];
      // Paths that saturate are as bad as can be, so one is as good as another.
      if (cost >= kSaturated ||
          !way_back(tables, target, track.rows[kept - 1], track.cheapest[kept - 1], first, last,
                    node, cost, states)) {
        for (int i = last, end = node; i >= first; end = states[i--] >> K)
          states[i] = static_cast<uint16_t>(end);
      }
      node = states[first] >> K;
    }
    return node;
  }

  static int cheapest_node(const Track<K>& track) {
    for (int node = 0; node < X::nodes; ++node)
      if (track.rows[X::kept][X::at(node)] == track.cheapest[X::kept]) return node;
    return 0;
  }

  // Targets as integers, starting `lead` values before the tile's first, round the circle.
  static void set_target(const SearchTables& tables, const float* tile, int lead,
                         Track<K>& track) {
    for (int i = 0; i < lead + kTileLength; ++i) {
      float x = tile[(i - lead) & (kTileLength - 1)];
      x = x < tables.clamp ? x : tables.clamp;
      x = x > -tables.clamp ? x : -tables.clamp;
      track.target[i] = static_cast<int16_t>(std::lrintf(x * tables.scale));
    }
  }

  // Searches T tiles without a condition. seam[t] = -1 where the path closes, else the node to
  // hold the seam to.
  template <int T>
  static void search_free(const SearchTables& tables, const float* tiles, Track<K>* tracks,
                          uint16_t* states, int* seam) {
    for (int t = 0; t < T; ++t) {
      set_target(tables, tiles + t * kTileLength, plan.lead, tracks[t]);
      std::memset(tracks[t].scratch[0], 0, sizeof tracks[t].scratch[0]);
    }
    forward<T>(tables, tracks, plan.lead);
    for (int t = 0; t < T; ++t) {
      int end = cheapest_node(tracks[t]);
      seam[t] = end;
      // A path that does not close often shows a better end: the node where it passed the seam.
      for (int attempt = 0; attempt < 3 && seam[t] >= 0; ++attempt) {
        end = seam[t];
        seam[t] = trace(tables, tracks[t], tracks[t].target + plan.lead, end,
                        states + t * kTileLength);
        if (seam[t] == end) seam[t] = -1;
      }
    }
  }

  // Searches the tiles of the given numbers, their seams held to the given nodes.
  template <int T>
  static void search_held(const SearchTables& tables, const float* tiles, const int64_t* number,
                          const int* seam, Track<K>* tracks, uint16_t* states) {
    for (int t = 0; t < T; ++t) {
      set_target(tables, tiles + number[t] * kTileLength, 0, tracks[t]);
      std::memset(tracks[t].rows[0], 0xFF, sizeof tracks[t].rows[0]);
      tracks[t].rows[0][X::at(seam[t])] = 0;
    }
    forward<T>(tables, tracks, 0);
    for (int t = 0; t < T; ++t) {
      uint16_t* circle = states + number[t] * kTileLength;
      if (trace(tables, tracks[t], tracks[t].target, seam[t], circle) != seam[t]) {
        close_circle(circle);
      }
    }
  }

  // Makes a legal circle of the bits that each state adds: for absurd tiles whose costs saturate.
  static void close_circle(uint16_t* states) {
    uint16_t bits[kTileLength];
    std::memcpy(bits, states, sizeof bits);
    unsigned state = 0;
    for (int i = kTileLength - 16; i < 2 * kTileLength; ++i) {
      state = state << K | (bits[i % kTileLength] & (X::branches - 1));
      states[i % kTileLength] = static_cast<uint16_t>(state);
    }
  }

  static void encode(const SearchTables& tables, const float* tiles, int64_t count,
                     uint16_t* states, std::byte* workspace) {
    constexpr int T = V::tiles;
    auto* tracks = reinterpret_cast<Track<K>*>(workspace);
    int64_t waiting[T];  // tiles whose path did not close
    int held[T], seam[T], waiting_count = 0;
    for (int64_t first = 0; first < count;) {
      const int together = count - first >= T ? T : 1;
      const float* group = tiles + first * kTileLength;
      uint16_t* out = states + first * kTileLength;
      if (together == T) {
        search_free<T>(tables, group, tracks, out, seam);
      } else {
        search_free<1>(tables, group, tracks, out, seam);
      }
      for (int t = 0; t < together; ++t) {
        if (seam[t] < 0) continue;
        waiting[waiting_count] = first + t;
        held[waiting_count] = seam[t];
        if (++waiting_count < T) continue;
        search_held<T>(tables, tiles, waiting, held, tracks, states);
        waiting_count = 0;
      }
      first += together;
    }
    for (int i = 0; i < waiting_count; ++i)
      search_held<1>(tables, tiles, waiting + i, held + i, tracks, states);
  }
};

template <class V>
constexpr Kernels kernels_of(const char* name, bool (*supported)()) {
  return {name,
          supported,
          V::tiles,
          {nullptr, Search<V, 1>::arrange, Search<V, 2>::arrange, Search<V, 3>::arrange,
           Search<V, 4>::arrange, Search<V, 5>::arrange, Search<V, 6>::arrange,
           Search<V, 7>::arrange, Search<V, 8>::arrange},
          {0, V::tiles * sizeof(Track<1>), V::tiles * sizeof(Track<2>), V::tiles * sizeof(Track<3>),
           V::tiles * sizeof(Track<4>), V::tiles * sizeof(Track<5>), V::tiles * sizeof(Track<6>),
           V::tiles * sizeof(Track<7>), V::tiles * sizeof(Track<8>)},
          {nullptr, Search<V, 1>::encode, Search<V, 2>::encode, Search<V, 3>::encode,
           Search<V, 4>::encode, Search<V, 5>::encode, Search<V, 6>::encode, Search<V, 7>::encode,
           Search<V, 8>::encode}};
}

}  // namespace
}  // namespace exl3
