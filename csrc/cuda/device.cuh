// What our kernels need besides CUDA itself: names that the chips' dialects share.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace exl3::cuda {

constexpr int kWarp = 32;  // lanes that work together, also where the hardware has 64
constexpr int kHadamard = 128;
constexpr float kInverseRoot = 0.08838834764831845f;  // 1 / sqrt(128)

__device__ __forceinline__ uint32_t bits_of(__half2 x) {
  return *reinterpret_cast<const uint32_t*>(&x);
}

__device__ __forceinline__ __half2 half2_of(uint32_t bits) {
  return *reinterpret_cast<const __half2*>(&bits);
}

// The value of the lane whose number differs in the bits of `mask`.
template <class Number>
__device__ __forceinline__ Number from_lane_xor(Number x, int mask) {
#ifdef __HIP_PLATFORM_AMD__
  return __shfl_xor(x, mask, kWarp);
#else
  return __shfl_xor_sync(0xFFFFFFFFu, x, mask);
#endif
}

// The value of lane `lane`.
__device__ __forceinline__ uint32_t from_lane(uint32_t x, int lane) {
#ifdef __HIP_PLATFORM_AMD__
  return __shfl(x, lane, kWarp);
#else
  return __shfl_sync(0xFFFFFFFFu, x, lane);
#endif
}

}  // namespace exl3::cuda
