// The three codebooks: 16-bit state -> value, in exact float16 arithmetic.
#pragma once

#include "cuda/device.cuh"

namespace exl3::cuda {

// A codebook mixes a state, x = multiplier * state + addend (mod 2^32), and makes a value of x.
struct Mix {
  uint32_t multiplier, addend;
};

enum class Kind {
  halves,  // 3inst, mcg: the sum of x's halves as float16 numbers, masked
  bytes,   // mul1: the sum of x's bytes, shifted and scaled
};

struct Codebook {
  Mix mix;
  Kind kind;
  float largest;  // greatest magnitude of its values
};

// By number: 3inst, mcg, mul1.
constexpr int kCodebooks = 3;
constexpr Codebook kCodebook[kCodebooks] = {
    {{89226354u, 64248484u}, Kind::halves, 3.97265625f},
    {{0xCBAC1FEDu, 0u}, Kind::halves, 3.94921875f},
    {{0x83DCD12Du, 0u}, Kind::bytes, 3.453125f},
};

// Values of two states, which are at most 16 bits: the first in the low half.
template <Kind kKind>
__device__ __forceinline__ uint32_t values_of(Mix mix, uint32_t first, uint32_t second) {
  uint32_t a = first * mix.multiplier + mix.addend;
  uint32_t b = second * mix.multiplier + mix.addend;
  if constexpr (kKind == Kind::halves) {
    a = (a & 0x8FFF8FFFu) ^ 0x3B603B60u;
    b = (b & 0x8FFF8FFFu) ^ 0x3B603B60u;
    const uint32_t low = __byte_perm(a, b, 0x5410), high = __byte_perm(a, b, 0x7632);
    return bits_of(__hadd2(half2_of(low), half2_of(high)));
  } else {
#ifdef __HIP_PLATFORM_AMD__
    a = 0x6400u + (a & 0xFF) + (a >> 8 & 0xFF) + (a >> 16 & 0xFF) + (a >> 24);
    b = 0x6400u + (b & 0xFF) + (b >> 8 & 0xFF) + (b >> 16 & 0xFF) + (b >> 24);
#else
    a = __dp4a(a, 0x01010101u, 0x6400u);
    b = __dp4a(b, 0x01010101u, 0x6400u);
#endif
    const uint32_t both = __byte_perm(a, b, 0x5410);
    return bits_of(__hfma2(half2_of(both), half2_of(0x1EEE1EEEu), half2_of(0xC931C931u)));
  }
}

// The same where the kind is known only at run time.
__device__ __forceinline__ uint32_t values_of(Codebook codebook, uint32_t first, uint32_t second) {
  return codebook.kind == Kind::halves ? values_of<Kind::halves>(codebook.mix, first, second)
                                       : values_of<Kind::bytes>(codebook.mix, first, second);
}

}  // namespace exl3::cuda
