#include "cpu/hadamard.hpp"

#include "cpu/threads.hpp"

namespace exl3 {
namespace {

constexpr int kHadamard = 128;
constexpr float kInverseRoot = 0.08838834764831845f;  // 1 / sqrt(128)
constexpr int64_t kRowsAtOnce = 16;

// One stage: sums and differences of numbers that are kDistance apart. The inner loop's length is a
// constant, so compilers make vectors of it.
template <int kDistance>
void stage(float* x) {
  for (int begin = 0; begin < kHadamard; begin += 2 * kDistance) {
    for (int i = begin; i < begin + kDistance; ++i) {
      const float a = x[i], b = x[i + kDistance];
      x[i] = a + b;
      x[i + kDistance] = a - b;
    }
  }
}

void transform(const float* x, const float* before, const float* after, float* out) {
  float block[kHadamard];
  for (int i = 0; i < kHadamard; ++i) block[i] = before != nullptr ? x[i] * before[i] : x[i];
  stage<64>(block);
  stage<32>(block);
  stage<16>(block);
  stage<8>(block);
  stage<4>(block);
  stage<2>(block);
  stage<1>(block);
  for (int i = 0; i < kHadamard; ++i) {
    const float y = block[i] * kInverseRoot;
    out[i] = after != nullptr ? y * after[i] : y;
  }
}

}  // namespace

void hadamard_128(const float* x, const float* before, const float* after, int64_t rows,
                  int64_t columns, int threads, float* out) {
  parallel_chunks(rows, kRowsAtOnce, threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      for (int64_t at = 0; at < columns; at += kHadamard) {
        transform(x + row * columns + at, before != nullptr ? before + at : nullptr,
                  after != nullptr ? after + at : nullptr, out + row * columns + at);
      }
    }
  });
}

}  // namespace exl3
