#include "cuda/decode.hpp"

#include "cuda/choose.hpp"
#include "cuda/decode_kernels.cuh"
#include "cuda/launch.hpp"

namespace exl3::cuda {
namespace {

template <class Number>
cudaError_t decode_weight_as(int codebook, int bits, const void* trellis, const void* suh,
                             const void* svh, int64_t tile_rows, int64_t tile_columns, void* out,
                             cudaStream_t stream) {
  const int64_t blocks = tile_rows / 8 * (tile_columns / 8);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(blocks));
  return with_bits(codebook, bits, [&](Mix mix, auto kind, auto k) {
    return launch(decode_weight_kernel<k.value, kind.value, Number>, grid, kDecodeThreads,
                  kExchangeBytes, stream, mix, static_cast<const uint32_t*>(trellis),
                  static_cast<const __half*>(suh), static_cast<const __half*>(svh), tile_columns,
                  static_cast<Number*>(out));
  });
}

}  // namespace

cudaError_t decode_trellis(int codebook, int bits, const void* trellis, int64_t tile_rows,
                           int64_t tile_columns, void* out, cudaStream_t stream) {
  if (tile_rows == 0 || tile_columns == 0) return cudaSuccess;
  const int64_t blocks =
      (tile_rows + kTileRowsOfBlock - 1) / kTileRowsOfBlock * ((tile_columns + 7) / 8);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(blocks));
  return with_bits(codebook, bits, [&](Mix mix, auto kind, auto k) {
    return launch(decode_trellis_kernel<k.value, kind.value>, grid, kDecodeThreads, kStagedBytes,
                  stream, mix, static_cast<const uint32_t*>(trellis), tile_rows, tile_columns,
                  static_cast<__half*>(out));
  });
}

cudaError_t decode_weight(int codebook, int bits, const void* trellis, const void* suh,
                          const void* svh, int64_t tile_rows, int64_t tile_columns, bool to_half,
                          void* out, cudaStream_t stream) {
  if (tile_rows % 8 != 0 || tile_columns % 8 != 0) return cudaErrorInvalidValue;
  if (tile_rows == 0 || tile_columns == 0) return cudaSuccess;
  const auto run = to_half ? &decode_weight_as<__half> : &decode_weight_as<float>;
  return run(codebook, bits, trellis, suh, svh, tile_rows, tile_columns, out, stream);
}

}  // namespace exl3::cuda
