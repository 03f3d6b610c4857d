// The trellis search with AVX-512 (BW, VL).
#include "cpu/encode.hpp"

#ifdef EXL3_X86

#include <immintrin.h>

#include <cmath>
#include <cstring>

// After every standard header, so that nothing shared with other files is compiled with AVX-512.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl")
#endif

#include "cpu/viterbi.hpp"

namespace exl3 {
namespace {

struct Avx512 {
  using Vec = __m512i;
  static constexpr int lanes = 32;
  static constexpr int tiles = 2;   // side by side
  static constexpr int unroll = 8;  // results in registers, for each tile

  static EXL3_INLINE Vec load_values(const int16_t* from) { return _mm512_load_si512(from); }
  static EXL3_INLINE Vec load(const uint16_t* from) { return _mm512_load_si512(from); }
  static EXL3_INLINE void store(uint16_t* to, Vec x) { _mm512_store_si512(to, x); }
  static EXL3_INLINE Vec broadcast(int x) { return _mm512_set1_epi16(static_cast<short>(x)); }
  // a - b, doubled so many times.
  template <int doublings>
  static EXL3_INLINE Vec difference(Vec a, Vec b) {
    Vec x = _mm512_subs_epi16(a, b);
    EXL3_UNROLL
    for (int i = 0; i < doublings; ++i) x = _mm512_adds_epi16(x, x);
    return x;
  }
  static EXL3_INLINE Vec rounded_product(Vec a, Vec b) { return _mm512_mulhrs_epi16(a, b); }
  static EXL3_INLINE Vec add(Vec a, Vec b) { return _mm512_adds_epu16(a, b); }
  static EXL3_INLINE Vec lowered(Vec a, Vec by) { return _mm512_subs_epu16(a, by); }
  static EXL3_INLINE Vec minimum(Vec a, Vec b) { return _mm512_min_epu16(a, b); }

  // a0 b0 a1 b1 ...
  static EXL3_INLINE void zip(Vec a, Vec b, Vec& low, Vec& high) {
    const Vec pick_low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9,
                                          40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1,
                                          32, 0);
    const Vec pick_high = _mm512_add_epi16(pick_low, _mm512_set1_epi16(16));
    low = _mm512_permutex2var_epi16(a, pick_low, b);
    high = _mm512_permutex2var_epi16(a, pick_high, b);
  }
};

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl");
}

}  // namespace

// A constant: nothing of this file may run before `supported` says that it can.
constexpr Kernels kAvx512 = kernels_of<Avx512>("avx512", supported);

}  // namespace exl3

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // EXL3_X86
