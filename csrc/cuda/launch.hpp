// Starting a kernel, in one place, which the tests replace to run kernels on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace exl3::cuda {

#if defined(__CUDACC__) || defined(__HIPCC__)

// kernel<<<grid, threads, shared, stream>>>(arguments...); shared: bytes.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared,
                   cudaStream_t stream, Arguments... arguments) {
  if (shared > 48 << 10) {  // more than that has to be asked for
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared, stream>>>(arguments...);
  return cudaGetLastError();
}

// A block's dynamic shared memory.
template <class Number>
__device__ __forceinline__ Number* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<Number*>(memory);
}

#else

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared, cudaStream_t,
                   Arguments... arguments) {
  return cuda_host::run(grid, threads, shared, [=] { kernel(arguments...); });
}

template <class Number>
Number* dynamic_shared() {
  return reinterpret_cast<Number*>(cuda_host::dynamic_memory());
}

#endif

}  // namespace exl3::cuda
