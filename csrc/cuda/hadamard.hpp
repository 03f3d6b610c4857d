// Launchers of the Hadamard transform in blocks of 128. No torch here.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace exl3::cuda {

// x (rows, columns) -> (x * before) B(columns) * after, columns a multiple of 128; float32 inside,
// rounded once. x and out: float, or __half; before, after: __half (columns,) or null.
// All pointers aligned to 16 bytes; out may be x.
cudaError_t hadamard_128(const void* x, bool is_half, const void* before, const void* after,
                         int64_t rows, int64_t columns, void* out, cudaStream_t stream);

}  // namespace exl3::cuda
