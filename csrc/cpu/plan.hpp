// How the search is done at each number of bits. These numbers define its result, so they are the
// same for every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/codebook.hpp"

namespace exl3 {

struct Plan {
  // 16-bit integers stand for values of at most `range` times the codebook's greatest magnitude;
  // tiles are clamped to `clamp` times it. A wide range keeps differences from saturating; a
  // narrow one leaves more of the 16 bits to the small errors of many bits.
  float range, clamp;
  // The squared error of a good path must be many units of the 16-bit cost: a difference is
  // doubled this often, saturating, before it is squared. Where that saturates too early for
  // outliers, the other factor of the square is doubled less often: from where one factor
  // saturates up to where both do, the cost grows linearly.
  int doublings, tail_doublings;
  // Steps walked before the tile's first value, round the circle, to forget the free start.
  int lead;
  // Costs are kept every `spacing` steps. Closer: more memory traffic; wider: a longer way back.
  int spacing;
};

constexpr Plan kPlans[9] = {
    {},
    {2.00f, 1.40f, 0, 0, 96, 8},
    {1.50f, 1.25f, 0, 0, 96, 4},
    {1.15f, 1.15f, 0, 0, 80, 2},
    {1.20f, 1.20f, 0, 0, 96, 1},
    {1.30f, 1.30f, 1, 1, 96, 1},
    {1.20f, 1.20f, 2, 2, 64, 1},
    {1.20f, 1.08f, 3, 3, 64, 1},
    {1.10f, 1.05f, 4, 3, 64, 1},
};

// A codebook as the search of one number of bits reads it. A node is what two neighbouring states
// share, 16 - bits bits; state = high << (16 - bits) | node leads from node state >> bits to node.
struct SearchTables {
  float scale, clamp;                      // integer = round(scale * min(max(x, -clamp), clamp))
  alignas(64) int16_t in_order[kStates];   // in the order a forward step reads it
  alignas(64) int16_t by_node[kStates];    // value of (high, node) at [node << bits | high]
};

}  // namespace exl3
