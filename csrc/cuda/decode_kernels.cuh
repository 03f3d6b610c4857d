// Whole matrices of packed tiles -> W_hat, and -> W.
#pragma once

#include "cuda/decode_tile.cuh"
#include "cuda/hadamard.cuh"
#include "cuda/launch.hpp"

namespace exl3::cuda {

constexpr int kDecodeThreads = 256;  // 8 warps, each a column of tiles
constexpr int kTileRowsOfBlock = 4;
constexpr int kStagedStride = kHadamard + 8;
constexpr int kStagedBytes = kTileRowsOfBlock * kTile * kStagedStride * sizeof(__half);

// A block decodes 4 x 8 tiles. Values go through shared memory, so that rows of 128 columns are
// written in accesses of 16 bytes; the padding spreads a tile's rows over the banks.
template <int kBits, Kind kKind>
__global__ void __launch_bounds__(kDecodeThreads)
    decode_trellis_kernel(Mix mix, const uint32_t* __restrict__ trellis, int64_t tile_rows,
                          int64_t tile_columns, __half* __restrict__ out) {
  auto staged = dynamic_shared<__half[kStagedStride]>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t across = (tile_columns + 7) / 8;  // blocks
  const int64_t first_row = blockIdx.x / across * kTileRowsOfBlock;
  const int64_t first_column = blockIdx.x % across * 8, column = first_column + warp;

  const typename Window<kBits>::Places places(lane);
  Window<kBits> window[kTileRowsOfBlock] = {};
#pragma unroll
  for (int i = 0; i < kTileRowsOfBlock; ++i) {  // all loads before the first use
    if (first_row + i < tile_rows && column < tile_columns) {
      window[i].load(trellis, ((first_row + i) * tile_columns + column) * 8 * kBits, places);
    }
  }
#pragma unroll
  for (int i = 0; i < kTileRowsOfBlock; ++i) {
    uint32_t pair[4];
    window[i].template values<kKind>(mix, lane, pair);
#pragma unroll
    for (int m = 0; m < kValuesOfLane; ++m) {
      const __half2 both = half2_of(pair[m / 2]);
      staged[i * kTile + row_of(lane, m)][warp * kTile + column_of(lane, m)] =
          m % 2 ? __high2half(both) : __low2half(both);
    }
  }
  __syncthreads();
  const int64_t columns = tile_columns * kTile;
  const int at = threadIdx.x % 16 * 8;  // 16 threads write a row
  if (first_column * kTile + at >= columns) return;
  for (int row = threadIdx.x / 16; row < kTileRowsOfBlock * kTile; row += kDecodeThreads / 16) {
    const int64_t matrix_row = first_row * kTile + row;
    if (matrix_row >= tile_rows * kTile) return;
    *reinterpret_cast<uint4*>(out + matrix_row * columns + first_column * kTile + at) =
        *reinterpret_cast<const uint4*>(&staged[row][at]);
  }
}

// One stage of the transform over one bit of the index of a thread's 64 numbers.
template <int kBit>
__device__ __forceinline__ void butterflies_64(float x[64]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    if (!(i & kBit)) butterfly(x[i], x[i | kBit]);
  }
}

__device__ __forceinline__ void hadamard_64(float x[64]) {
  butterflies_64<1>(x);
  butterflies_64<2>(x);
  butterflies_64<4>(x);
  butterflies_64<8>(x);
  butterflies_64<16>(x);
  butterflies_64<32>(x);
}

__device__ __forceinline__ void store8(float* to, const float x[8]) {
  store4(to, x);
  store4(to + 4, x + 4);
}

__device__ __forceinline__ void store8(__half* to, const float x[8]) {
  uint4 eight;
  eight.x = bits_of(__floats2half2_rn(x[0], x[1]));
  eight.y = bits_of(__floats2half2_rn(x[2], x[3]));
  eight.z = bits_of(__floats2half2_rn(x[4], x[5]));
  eight.w = bits_of(__floats2half2_rn(x[6], x[7]));
  *reinterpret_cast<uint4*>(to) = eight;
}

constexpr int kExchangeStride = kHadamard + 4;  // rows begin 4 banks apart
constexpr int kExchangeBytes = kHadamard * kExchangeStride * sizeof(float);

// A block makes 128 x 128 weights, 64 a thread. The transform has a stage for each of the 7 bits of
// the row and of the column. A thread that has decoded the 8 tiles of a column of tiles holds rows'
// bits 0, 3, 4, 5, 6 and columns' bit 3; rows' bits 1 and 2 are bits of the lane; for the other six
// of the columns the numbers change hands once, through shared memory.
template <int kBits, Kind kKind, class Number>
__global__ void __launch_bounds__(kDecodeThreads)
    decode_weight_kernel(Mix mix, const uint32_t* __restrict__ trellis,
                         const __half* __restrict__ suh, const __half* __restrict__ svh,
                         int64_t tile_columns, Number* __restrict__ out) {
  float* exchange = dynamic_shared<float>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const typename Window<kBits>::Places places(lane);
  const int64_t down = blockIdx.x / (tile_columns / 8), across = blockIdx.x % (tile_columns / 8);
  const int64_t tile = down * 8 * tile_columns + across * 8 + warp;
  float x[64];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    Window<kBits> window;
    window.load(trellis, (tile + i * tile_columns) * 8 * kBits, places);
    uint32_t pair[4];
    window.template values<kKind>(mix, lane, pair);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const float2 both = __half22float2(half2_of(pair[m]));
      x[8 * i + 2 * m] = both.x;
      x[8 * i + 2 * m + 1] = both.y;
    }
  }
  hadamard_64(x);
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i] = butterfly_lanes(butterfly_lanes(x[i], lane, 1), lane, 2);
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int row = i / 8 * kTile + row_of(lane, i % 8);
    exchange[row * kExchangeStride + warp * kTile + column_of(lane, i % 8)] = x[i];
  }
  __syncthreads();
  // Now a thread has a row's columns whose bit 3 is `half`.
  const int row = warp * kTile + lane % kTile, half = lane / kTile;
  const float* from = exchange + row * kExchangeStride + 8 * half;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    load4(from + j * kTile, x + 8 * j);
    load4(from + j * kTile + 4, x + 8 * j + 4);
  }
  hadamard_64(x);
  const int64_t matrix_row = down * kHadamard + row, column = across * kHadamard + 8 * half;
  const float scale = __half2float(suh[matrix_row]) * (1.0f / kHadamard);
  Number* to = out + matrix_row * tile_columns * kTile + column;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float factor[8];
    load4(svh + column + j * kTile, factor);
    load4(svh + column + j * kTile + 4, factor + 4);
#pragma unroll
    for (int e = 0; e < 8; ++e) x[8 * j + e] *= scale * factor[e];
    store8(to + j * kTile, x + 8 * j);
  }
}

}  // namespace exl3::cuda
