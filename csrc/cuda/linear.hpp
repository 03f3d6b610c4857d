// Launcher of the forward of a linear layer for few rows: weights are decoded where they are
// multiplied, once for all rows. No torch here.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace exl3::cuda {

constexpr int kLinearRows = 32;  // at most

// Bytes that a call needs; inputs and outputs are multiples of 128.
size_t linear_workspace(int64_t rows, int64_t inputs, int64_t outputs);

// x (rows, inputs) -> y = ((x * suh) B) W_hat B * svh + bias, (rows, outputs), all __half; bias may
// be null. Inputs are rounded to float16 after the first transform, as W_hat is; sums are float32.
// Sums are made in an order that follows from the shape alone. codebook: 0 = 3inst, 1 = mcg,
// 2 = mul1. Pointers aligned to 16 bytes.
cudaError_t linear(int codebook, int bits, const void* x, const void* trellis, const void* suh,
                   const void* svh, const void* bias, int64_t rows, int64_t inputs,
                   int64_t outputs, void* workspace, size_t workspace_bytes, void* y,
                   cudaStream_t stream);

}  // namespace exl3::cuda
