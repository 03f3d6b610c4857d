// The tensor-core product that the format's tile order was made for.
#pragma once

#include "cuda/device.cuh"

namespace exl3::cuda {

// c (16, 8) += a (16, 16) b (16, 8): float16 operands, float32 sums. With g = lane / 4 and
// t = lane % 4 a lane holds, in pairs,
//   a: rows g, g + 8, g, g + 8 of columns 2t, 2t + 1 (first two) and 2t + 8, 2t + 9 (last two);
//   b: rows 2t, 2t + 1 (first) and 2t + 8, 2t + 9 (second) of column g;
//   c: columns 2t, 2t + 1 of rows g (first two) and g + 8 (last two).
__device__ __forceinline__ void mma_16_8_16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  // For chips without it: right, and slow. Lanes fetch the operands of their sums from each other.
  const int lane = threadIdx.x % kWarp, row = lane / 4, column = lane % 4 * 2;
#pragma unroll
  for (int k = 0; k < 16; k += 2) {
    const int high = k / 8, t = k % 8 / 2;
    const uint32_t top = from_lane(a[2 * high], row * 4 + t);
    const uint32_t bottom = from_lane(a[2 * high + 1], row * 4 + t);
    const uint32_t left = from_lane(b[high], column * 4 + t);
    const uint32_t right = from_lane(b[high], (column + 1) * 4 + t);
    const float2 a0 = __half22float2(half2_of(top)), a1 = __half22float2(half2_of(bottom));
    const float2 b0 = __half22float2(half2_of(left)), b1 = __half22float2(half2_of(right));
    c[0] += a0.x * b0.x + a0.y * b0.y;
    c[1] += a0.x * b1.x + a0.y * b1.y;
    c[2] += a1.x * b0.x + a1.y * b0.y;
    c[3] += a1.x * b1.x + a1.y * b1.y;
  }
#endif
}

}  // namespace exl3::cuda
