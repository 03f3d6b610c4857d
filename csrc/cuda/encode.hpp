// Launcher of the trellis search. No torch here.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace exl3::cuda {

// Bytes of workspace with which `encode_tiles` is fastest: bounded, however many tiles there are.
// 0 for bits other than 1 to 8.
size_t encode_workspace(int64_t tiles, int bits);

// For each tile the legal circle of 256 states whose values are nearest to it.
//
// codebook: 0 = 3inst, 1 = mcg, 2 = mul1. bits: 1 to 8. tiles: float (n, 256), finite. states,
// values: (n, 256). workspace: device memory aligned to 256 bytes; with less than
// `encode_workspace` asks for, tiles are taken in more rounds. The result of a tile depends on the
// tile alone. Nothing waits for the device.
cudaError_t encode_tiles(int codebook, int bits, const float* tiles, int64_t n, void* workspace,
                         size_t workspace_bytes, uint16_t* states, float* values,
                         cudaStream_t stream);

}  // namespace exl3::cuda
