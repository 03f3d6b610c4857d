// The trellis search in plain C++ over short vectors of 32-bit integers, which compilers map to
// whatever the machine has.
// Vectors wider than the machine's are passed between functions of this file only.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#include "cpu/viterbi.hpp"

namespace exl3 {
namespace {

constexpr int kLanes = 8;

#if defined(__GNUC__)
using Lanes = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));
#else
struct Lanes {
  int32_t lane[kLanes];
  int32_t& operator[](int i) { return lane[i]; }
  int32_t operator[](int i) const { return lane[i]; }
};

template <class F>
Lanes each(F f) {
  Lanes x;
  for (int i = 0; i < kLanes; ++i) x[i] = f(i);
  return x;
}
inline Lanes operator+(Lanes a, Lanes b) { return each([&](int i) { return a[i] + b[i]; }); }
inline Lanes operator-(Lanes a, Lanes b) { return each([&](int i) { return a[i] - b[i]; }); }
inline Lanes operator*(Lanes a, int b) { return each([&](int i) { return a[i] * b; }); }
inline Lanes operator*(Lanes a, Lanes b) { return each([&](int i) { return a[i] * b[i]; }); }
inline Lanes operator>>(Lanes a, int n) { return each([&](int i) { return a[i] >> n; }); }
#endif

struct Portable {
  using Vec = Lanes;
  static constexpr int lanes = kLanes;
  static constexpr int tiles = 1;
  static constexpr int unroll = 2;

  template <class T>
  static EXL3_INLINE Vec widened(const T* from) {
    Vec x{};
    for (int i = 0; i < lanes; ++i) x[i] = from[i];
    return x;
  }
  static EXL3_INLINE Vec load_values(const int16_t* from) { return widened(from); }
  static EXL3_INLINE Vec load(const uint16_t* from) { return widened(from); }
  static EXL3_INLINE Vec broadcast(int x) {
    Vec all{};
    for (int i = 0; i < lanes; ++i) all[i] = x;
    return all;
  }

  static EXL3_INLINE Vec minimum(const Vec& a, const Vec& b) {
#if defined(__GNUC__)
    return a < b ? a : b;
#else
    return each([&](int i) { return smaller(a[i], b[i]); });
#endif
  }
  // Costs saturate here: after the minima, which saturated and unsaturated costs agree on.
  static EXL3_INLINE void store(uint16_t* to, const Vec& x) {
    const Vec y = minimum(x, broadcast(kSaturated));
    for (int i = 0; i < lanes; ++i) to[i] = static_cast<uint16_t>(y[i]);
  }

  static EXL3_INLINE Vec maximum(const Vec& a, const Vec& b) {
#if defined(__GNUC__)
    return a > b ? a : b;
#else
    return each([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
#endif
  }

  // a - b, doubled so many times, saturated to 16 bits.
  template <int doublings>
  static EXL3_INLINE Vec difference(const Vec& a, const Vec& b) {
    const Vec x = (a - b) * (1 << doublings);
    return maximum(minimum(x, broadcast(32767)), broadcast(-32768));
  }
  static EXL3_INLINE Vec rounded_product(const Vec& a, const Vec& b) {
    return (a * b + broadcast(1 << 14)) >> 15;
  }
  static EXL3_INLINE Vec add(const Vec& a, const Vec& b) { return a + b; }  // see `store`
  static EXL3_INLINE Vec lowered(const Vec& a, const Vec& by) { return a - minimum(a, by); }

  static EXL3_INLINE void zip(const Vec& a, const Vec& b, Vec& low, Vec& high) {
    Vec first{}, second{};
    for (int i = 0; i < lanes; ++i) {
      first[i] = i % 2 == 0 ? a[i / 2] : b[i / 2];
      second[i] = i % 2 == 0 ? a[(lanes + i) / 2] : b[(lanes + i) / 2];
    }
    low = first;
    high = second;
  }
};

}  // namespace

constexpr Kernels kPortable = kernels_of<Portable>("portable", [] { return true; });

}  // namespace exl3
