#include "cuda/hadamard.hpp"

#include "cuda/hadamard.cuh"
#include "cuda/launch.hpp"

namespace exl3::cuda {
namespace {

template <class Number>
cudaError_t run(const void* x, const void* before, const void* after, int64_t rows,
                int64_t columns, void* out, cudaStream_t stream) {
  constexpr int kThreads = 256, kWarps = kThreads / kWarp;
  const int64_t blocks = columns / kHadamard, count = rows * blocks;
  if (count == 0) return cudaSuccess;
  const int64_t grid = (count + kWarps - 1) / kWarps;
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(hadamard_kernel<Number>, dim3(static_cast<unsigned>(grid)), kThreads, 0, stream,
                static_cast<const Number*>(x), static_cast<const __half*>(before),
                static_cast<const __half*>(after), count, blocks, static_cast<Number*>(out));
}

}  // namespace

cudaError_t hadamard_128(const void* x, bool is_half, const void* before, const void* after,
                         int64_t rows, int64_t columns, void* out, cudaStream_t stream) {
  const auto run_as = is_half ? &run<__half> : &run<float>;
  return run_as(x, before, after, rows, columns, out, stream);
}

}  // namespace exl3::cuda
