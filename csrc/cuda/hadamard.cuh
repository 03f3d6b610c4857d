// The Hadamard transform of 128 numbers by one warp, four neighbours a lane, in float32.
#pragma once

#include "cuda/device.cuh"

namespace exl3::cuda {

__device__ __forceinline__ void butterfly(float& a, float& b) {
  const float sum = a + b, difference = a - b;
  a = sum;
  b = difference;
}

// One stage between lanes: the lane with the bit of `mask` set has the number to be subtracted.
__device__ __forceinline__ float butterfly_lanes(float x, int lane, int mask) {
  const float other = from_lane_xor(x, mask);
  return lane & mask ? other - x : x + other;
}

// x: numbers 4 * lane .. 4 * lane + 3, transformed in place and not yet divided by sqrt(128).
__device__ __forceinline__ void hadamard_128(float x[4], int lane) {
  butterfly(x[0], x[1]);
  butterfly(x[2], x[3]);
  butterfly(x[0], x[2]);
  butterfly(x[1], x[3]);
#pragma unroll
  for (int mask = 1; mask < kWarp; mask *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = butterfly_lanes(x[i], lane, mask);
  }
}

// Four neighbours in one access.
__device__ __forceinline__ void load4(const float* from, float x[4]) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}

__device__ __forceinline__ void load4(const __half* from, float x[4]) {
  const uint2 four = *reinterpret_cast<const uint2*>(from);
  const float2 low = __half22float2(half2_of(four.x)), high = __half22float2(half2_of(four.y));
  x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
}

__device__ __forceinline__ void store4(float* to, const float x[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}

__device__ __forceinline__ void store4(__half* to, const float x[4]) {
  *reinterpret_cast<uint2*>(to) = make_uint2(bits_of(__floats2half2_rn(x[0], x[1])),
                                             bits_of(__floats2half2_rn(x[2], x[3])));
}

__device__ __forceinline__ void multiply4(float x[4], const __half* by) {
  float factor[4];
  load4(by, factor);
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] *= factor[i];
}

// Blocks of 128 of x (count, 128): out = H (x * before) * after, where a block's scales are those
// of its place in rows of `blocks` blocks. Either may be null.
template <class Number>
__global__ void __launch_bounds__(256)
    hadamard_kernel(const Number* x, const __half* __restrict__ before,
                    const __half* __restrict__ after, int64_t count, int64_t blocks,
                    Number* out) {
  const int lane = threadIdx.x % kWarp;
  const int64_t block = blockIdx.x * (256 / kWarp) + threadIdx.x / kWarp;
  if (block >= count) return;
  const int64_t place = block % blocks * kHadamard + 4 * lane;
  float four[4];
  load4(x + block * kHadamard + 4 * lane, four);
  if (before != nullptr) multiply4(four, before + place);
  hadamard_128(four, lane);
#pragma unroll
  for (int i = 0; i < 4; ++i) four[i] *= kInverseRoot;
  if (after != nullptr) multiply4(four, after + place);
  store4(out + block * kHadamard + 4 * lane, four);
}

}  // namespace exl3::cuda
