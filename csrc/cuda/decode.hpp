// Launchers that decode packed trellises. No torch here.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace exl3::cuda {

// codebook: 0 = 3inst, 1 = mcg, 2 = mul1. trellis: (tile_rows, tile_columns, 16 * bits) int16,
// aligned to 4 bytes; bits 1 to 8. All outputs aligned to 16 bytes.

// out: __half (16 * tile_rows, 16 * tile_columns), W_hat, exact.
cudaError_t decode_trellis(int codebook, int bits, const void* trellis, int64_t tile_rows,
                           int64_t tile_columns, void* out, cudaStream_t stream);

// out: W = diag(suh) B W_hat B diag(svh), __half or float, of the same shape; both numbers of tiles
// multiples of 8. suh, svh: __half. float32 inside, rounded once.
cudaError_t decode_weight(int codebook, int bits, const void* trellis, const void* suh,
                          const void* svh, int64_t tile_rows, int64_t tile_columns, bool to_half,
                          void* out, cudaStream_t stream);

}  // namespace exl3::cuda
