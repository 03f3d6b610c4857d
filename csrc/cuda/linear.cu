#include "cuda/linear.hpp"

#include <algorithm>

#include "cuda/choose.hpp"
#include "cuda/hadamard.hpp"
#include "cuda/launch.hpp"
#include "cuda/linear.cuh"

namespace exl3::cuda {
namespace {

// How the inputs are cut, by the shape alone: so that blocks of 256 threads fill a large chip once
// or twice. More rows want fewer slices, for every slice writes all outputs.
struct Cut {
  int slice, slices;
};

Cut cut(int64_t rows, int64_t inputs, int64_t outputs) {
  const int64_t wanted = rows <= kGroup ? 512 : 256;  // blocks
  const int64_t blocks = inputs / kHadamard;
  const int64_t slices = std::clamp<int64_t>(wanted / (outputs / kHadamard), 1, blocks);
  const int64_t slice = (blocks + slices - 1) / slices * kHadamard;
  return {static_cast<int>(slice), static_cast<int>((inputs + slice - 1) / slice)};
}

// Rows that are transformed beforehand: more than one group, of which every block needs all.
size_t transformed_bytes(int64_t rows, int64_t inputs) {
  return rows <= kGroup ? 0 : rows * inputs * sizeof(__half);
}

struct Arguments {
  const __half* x;
  const uint32_t* trellis;
  const __half* suh;
  int rows, inputs, outputs;
  Cut cut;
  float* partial;
};

template <int kGroups>
cudaError_t multiply(int codebook, int bits, const Arguments& to, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(to.outputs / kHadamard * to.cut.slices));
  return with_bits(codebook, bits, [&](Mix mix, auto kind, auto k) {
    return launch(linear_kernel<k.value, kind.value, kGroups>, grid, kLinearThreads,
                  kLinearBytes<kGroups>, stream, mix, to.x, to.trellis, to.suh, to.rows, to.inputs,
                  to.outputs, to.cut.slice, to.partial);
  });
}

}  // namespace

size_t linear_workspace(int64_t rows, int64_t inputs, int64_t outputs) {
  const int64_t slices = cut(rows, inputs, outputs).slices;
  return transformed_bytes(rows, inputs) + slices * rows * outputs * sizeof(float);
}

cudaError_t linear(int codebook, int bits, const void* x, const void* trellis, const void* suh,
                   const void* svh, const void* bias, int64_t rows, int64_t inputs,
                   int64_t outputs, void* workspace, size_t workspace_bytes, void* y,
                   cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  if (rows < 0 || rows > kLinearRows || inputs < kHadamard || inputs % kHadamard != 0 ||
      outputs < kHadamard || outputs % kHadamard != 0 || bits < 1 || bits > 8 ||
      inputs > INT32_MAX || outputs > INT32_MAX || inputs > INT64_MAX / 8 / outputs ||
      inputs * outputs / 32 * bits > UINT32_MAX ||  // words, as the kernel counts them
      workspace_bytes < linear_workspace(rows, inputs, outputs)) {
    return cudaErrorInvalidValue;
  }
  const size_t transformed = transformed_bytes(rows, inputs);
  if (transformed > 0) {
    const cudaError_t error = hadamard_128(x, true, suh, nullptr, rows, inputs, workspace, stream);
    if (error != cudaSuccess) return error;
    x = workspace;
  }
  const Arguments arguments{static_cast<const __half*>(x),
                            static_cast<const uint32_t*>(trellis),
                            static_cast<const __half*>(suh),
                            static_cast<int>(rows),
                            static_cast<int>(inputs),
                            static_cast<int>(outputs),
                            cut(rows, inputs, outputs),
                            reinterpret_cast<float*>(static_cast<char*>(workspace) + transformed)};
  const auto run = rows <= kGroup ? &multiply<1> : rows <= 2 * kGroup ? &multiply<2> : &multiply<4>;
  const cudaError_t error = run(codebook, bits, arguments, stream);
  if (error != cudaSuccess) return error;
  const int64_t blocks = rows * outputs / kHadamard;
  return launch(finish_kernel, dim3(static_cast<unsigned>((blocks + 3) / 4)), 128, 0, stream,
                arguments.partial, arguments.cut.slices, static_cast<const __half*>(svh),
                static_cast<const __half*>(bias), arguments.rows, outputs, static_cast<__half*>(y));
}

}  // namespace exl3::cuda
