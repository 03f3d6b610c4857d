// The trellis search with AVX2.
#include "cpu/encode.hpp"

#ifdef EXL3_X86

#include <immintrin.h>

#include <cmath>
#include <cstring>

// After every standard header, so that nothing shared with other files is compiled with AVX2.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#include "cpu/viterbi.hpp"

namespace exl3 {
namespace {

struct Avx2 {
  using Vec = __m256i;
  static constexpr int lanes = 16;
  static constexpr int tiles = 2;   // side by side
  static constexpr int unroll = 4;  // results in registers, for each tile

  static EXL3_INLINE Vec load_values(const int16_t* from) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
  }
  static EXL3_INLINE Vec load(const uint16_t* from) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
  }
  static EXL3_INLINE void store(uint16_t* to, Vec x) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), x);
  }
  static EXL3_INLINE Vec broadcast(int x) { return _mm256_set1_epi16(static_cast<short>(x)); }
  // a - b, doubled so many times.
  template <int doublings>
  static EXL3_INLINE Vec difference(Vec a, Vec b) {
    Vec x = _mm256_subs_epi16(a, b);
    EXL3_UNROLL
    for (int i = 0; i < doublings; ++i) x = _mm256_adds_epi16(x, x);
    return x;
  }
  static EXL3_INLINE Vec rounded_product(Vec a, Vec b) { return _mm256_mulhrs_epi16(a, b); }
  static EXL3_INLINE Vec add(Vec a, Vec b) { return _mm256_adds_epu16(a, b); }
  static EXL3_INLINE Vec lowered(Vec a, Vec by) { return _mm256_subs_epu16(a, by); }
  static EXL3_INLINE Vec minimum(Vec a, Vec b) { return _mm256_min_epu16(a, b); }

  // a0 b0 a1 b1 ...; the unpacks work within halves, which are then put in order.
  static EXL3_INLINE void zip(Vec a, Vec b, Vec& low, Vec& high) {
    const Vec x = _mm256_unpacklo_epi16(a, b), y = _mm256_unpackhi_epi16(a, b);
    low = _mm256_permute2x128_si256(x, y, 0x20);
    high = _mm256_permute2x128_si256(x, y, 0x31);
  }
};

bool supported() { return __builtin_cpu_supports("avx2"); }

}  // namespace

// A constant: nothing of this file may run before `supported` says that it can.
constexpr Kernels kAvx2 = kernels_of<Avx2>("avx2", supported);

}  // namespace exl3

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // EXL3_X86
