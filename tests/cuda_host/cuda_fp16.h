// float16 on the CPU as the kernels of csrc/cuda use it: every operation rounds once.
#pragma once

#include <cmath>

#include "cuda_runtime.h"

struct __half {
  _Float16 value;
};
struct __half2 {
  __half x, y;
};

// Sums and products of two float16 numbers are exact in double, and so are the codebooks' fmas.
// Rounded once, by way of a float that has been rounded to odd: conversions from float are fast.
inline __half half_of(double x) {
  float near = static_cast<float>(x);
  if (near != x && near - near == 0) {  // not exact, not infinite
    uint32_t bits;
    memcpy(&bits, &near, sizeof bits);
    bits = (bits - (std::fabs(near) > std::fabs(x))) | 1;
    memcpy(&near, &bits, sizeof bits);
  }
  return {static_cast<_Float16>(near)};
}
inline double double_of(__half x) { return static_cast<double>(x.value); }

inline __half2 __hadd2(__half2 a, __half2 b) {
  return {half_of(double_of(a.x) + double_of(b.x)), half_of(double_of(a.y) + double_of(b.y))};
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {half_of(double_of(a.x) * double_of(b.x) + double_of(c.x)),
          half_of(double_of(a.y) * double_of(b.y) + double_of(c.y))};
}
inline __half __low2half(__half2 x) { return x.x; }
inline __half __high2half(__half2 x) { return x.y; }
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
