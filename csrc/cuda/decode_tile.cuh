// A packed tile -> values, by one warp: lane t decodes values 8t .. 8t + 7.
//
// These eight are what lane t holds of a 16 x 16 operand of mma.m16n8k16: the format was made so.
#pragma once

#include "cuda/codebook.cuh"

namespace exl3::cuda {

constexpr int kTile = 16;           // rows and columns of a tile
constexpr int kValuesOfLane = 8;

// The 7 * kBits + 16 bits of a tile's circular string that a lane's eight states cover.
template <int kBits>
struct Window {
  static constexpr int kString = 8 * kBits;  // words of 32 bits, most significant bit first
  static constexpr int kWords = kBits <= 4 ? 2 : 3;  // that a window touches at most
  static constexpr int kAligned = (7 * kBits + 16 + 31) / 32;  // that it fills when shifted

  uint32_t word[kWords];

  // The words that the window of a lane touches, counted from the tile's first.
  struct Places {
    uint32_t at[kWords];

    __device__ __forceinline__ explicit Places(int lane) {
      int start = (kValuesOfLane * lane + 1) * kBits - 16;  // the first states reach back into the
      if (start < 0) start += 32 * kString;                 // end of the circle
#pragma unroll
      for (int i = 0; i < kWords; ++i) at[i] = (start / 32 + i) % kString;
    }
  };

  // tile: its first word, counted from `trellis`.
  template <class Index>
  __device__ __forceinline__ void load(const uint32_t* __restrict__ trellis, Index tile,
                                       const Places& places) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = __ldg(trellis + (tile + places.at[i]));
  }

  // The lane's values in pairs: (0, 1), (2, 3), (4, 5), (6, 7).
  template <Kind kKind>
  __device__ __forceinline__ void values(Mix mix, int lane, uint32_t pair[4]) const {
    const int offset = ((kValuesOfLane * lane + 1) * kBits + 16) & 31;  // a constant for 4 and 8
    uint32_t aligned[kAligned];
#pragma unroll
    for (int i = 0; i < kAligned; ++i) {
      aligned[i] = __funnelshift_l(i + 1 < kWords ? word[i + 1] : 0, word[i], offset);
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      pair[m] = values_of<kKind>(mix, state(aligned, 2 * m), state(aligned, 2 * m + 1));
    }
  }

 private:
  // Bits m * kBits .. m * kBits + 15; all shifts are known to the compiler once m's loop is unrolled.
  static __device__ __forceinline__ uint32_t state(const uint32_t aligned[kAligned], int m) {
    const int word = m * kBits / 32, bit = m * kBits % 32;
    if (bit <= 16) return aligned[word] >> (16 - bit) & 0xFFFFu;
    return __funnelshift_l(aligned[word + 1], aligned[word], bit) >> 16;
  }
};

// Rows and columns in their tile of a lane's value m.
__device__ __forceinline__ int row_of(int lane, int m) {
  return 2 * (lane % 4) + (m & 1) + 8 * (m >> 1 & 1);
}
__device__ __forceinline__ int column_of(int lane, int m) { return lane / 4 + 8 * (m >> 2); }

}  // namespace exl3::cuda
