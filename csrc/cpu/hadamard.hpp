// The Hadamard transform in blocks of 128.
#pragma once

#include <cstdint>

namespace exl3 {

// (x * before) B(columns) * after for x (rows, columns), columns a multiple of 128. Either scale,
// float (columns,), may be null. out may be x.
void hadamard_128(const float* x, const float* before, const float* after, int64_t rows,
                  int64_t columns, int threads, float* out);

}  // namespace exl3
