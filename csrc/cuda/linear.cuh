// y = x W for few rows of x: a warp decodes tile after tile of one column of tiles and multiplies.
#pragma once

#include "cuda/decode_tile.cuh"
#include "cuda/hadamard.cuh"
#include "cuda/launch.hpp"
#include "cuda/mma.cuh"

namespace exl3::cuda {

constexpr int kLinearThreads = 256;  // 8 warps: 128 columns, a block of the output's transform
constexpr int kGroup = 8;            // rows of x that one tensor-core product takes
constexpr int kAhead = 4;            // tiles of a warp whose loads are under way
// Inputs in shared memory at a time, of every row; padded, so that 8 rows begin 4 banks apart.
constexpr int kChunk = 256, kChunkStride = kChunk + 8;

// Inputs [first, first + size) of all rows -> shared memory, float16; rows beyond `rows` are zero.
// With kTransform they are transformed on the way, else they have been.
template <int kGroups, bool kTransform>
__device__ __forceinline__ void stage_inputs(const __half* __restrict__ x,
                                             const __half* __restrict__ suh, int rows,
                                             int inputs, int first, int size,
                                             __half (*staged)[kChunkStride]) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int blocks = size / kHadamard;
  for (int i = warp; i < kGroups * kGroup * blocks; i += kLinearThreads / kWarp) {
    const int row = i / blocks, at = i % blocks * kHadamard + 4 * lane;
    float four[4] = {};
    if (row < rows) {  // the same for all lanes
      load4(x + static_cast<int64_t>(row) * inputs + first + at, four);
      if constexpr (kTransform) {
        multiply4(four, suh + first + at);
        hadamard_128(four, lane);
#pragma unroll
        for (int k = 0; k < 4; ++k) four[k] *= kInverseRoot;
      }
    }
    store4(&staged[row][at], four);
  }
}

// Weights are the left operand, so that 8 rows of x fill the right one: y^T = W^T x^T.
template <int kBits, Kind kKind, int kGroups>
__device__ __forceinline__ void multiply_tile(const Window<kBits>& window, Mix mix, int lane,
                                              const __half (*staged)[kChunkStride], int at,
                                              float sum[kGroups][4]) {
  uint32_t pair[4];
  window.template values<kKind>(mix, lane, pair);
  const uint32_t a[4] = {pair[0], pair[2], pair[1], pair[3]};  // rows (outputs) before inputs
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const __half* from = &staged[g * kGroup + lane / 4][at + lane % 4 * 2];
    const uint32_t b[2] = {*reinterpret_cast<const uint32_t*>(from),
                           *reinterpret_cast<const uint32_t*>(from + 8)};
    mma_16_8_16(sum[g], a, b);
  }
}

template <int kGroups>
constexpr int kLinearBytes = kGroups * kGroup * kChunkStride * sizeof(__half);

// A block makes 128 outputs from a slice of the inputs: partial (slices, rows, outputs), float32.
template <int kBits, Kind kKind, int kGroups>
__global__ void __launch_bounds__(kLinearThreads, kGroups == 4 ? 2 : 3)
    linear_kernel(Mix mix, const __half* __restrict__ x, const uint32_t* __restrict__ trellis,
                  const __half* __restrict__ suh, int rows, int inputs, int outputs, int slice,
                  float* __restrict__ partial) {
  auto staged = dynamic_shared<__half[kChunkStride]>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int across = outputs / kHadamard;  // blocks
  const int number = blockIdx.x / across, first_output = blockIdx.x % across * kHadamard;
  const int first = number * slice, end = min(first + slice, inputs);
  const uint32_t row_words = outputs / kTile * 8 * kBits;  // of a row of tiles
  uint32_t tile = first / kTile * row_words + (first_output / kTile + warp) * 8 * kBits;
  const typename Window<kBits>::Places places(lane);
  float sum[kGroups][4] = {};

  Window<kBits> next[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) next[i].load(trellis, tile + i * row_words, places);
  for (int chunk = first; chunk < end; chunk += kChunk) {
    const int size = min(kChunk, end - chunk);
    __syncthreads();
    stage_inputs<kGroups, kGroups == 1>(x, suh, rows, inputs, chunk, size, staged);
    __syncthreads();
    for (int at = 0; at < size; at += kAhead * kTile) {
      Window<kBits> window[kAhead];
      tile += kAhead * row_words;
      const bool more = chunk + at + kAhead * kTile < end;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        window[i] = next[i];
        if (more) next[i].load(trellis, tile + i * row_words, places);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        multiply_tile<kBits, kKind, kGroups>(window[i], mix, lane, staged, at + i * kTile, sum);
      }
    }
  }
  const int output = first_output + warp * kTile + lane / 4;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = g * kGroup + lane % 4 * 2 + i % 2;
      if (row < rows) {
        partial[(static_cast<int64_t>(number) * rows + row) * outputs + output + i / 2 * 8] =
            sum[g][i];
      }
    }
  }
}

// Slices summed in their order, transformed, scaled: one warp for 128 outputs of a row.
__global__ void __launch_bounds__(128)
    finish_kernel(const float* __restrict__ partial, int slices, const __half* __restrict__ svh,
                  const __half* __restrict__ bias, int rows, int64_t outputs,
                  __half* __restrict__ y) {
  const int lane = threadIdx.x % kWarp;
  const int64_t block = blockIdx.x * static_cast<int64_t>(128 / kWarp) + threadIdx.x / kWarp;
  const int64_t at = block * kHadamard + 4 * lane;  // in (rows, outputs)
  if (block * kHadamard >= rows * outputs) return;
  float sum[4] = {};
  for (int s = 0; s < slices; ++s) {
    float four[4];
    load4(partial + s * rows * outputs + at, four);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += four[i];
  }
  hadamard_128(sum, lane);
  const int64_t output = at % outputs;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] *= kInverseRoot;
  multiply4(sum, svh + output);
  if (bias != nullptr) {
    float four[4];
    load4(bias + output, four);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += four[i];
  }
  store4(y + at, sum);
}

}  // namespace exl3::cuda
