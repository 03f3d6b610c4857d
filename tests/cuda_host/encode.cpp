// The trellis search of csrc/cuda as a library for the CPU, and what of CUDA it alone uses.
#include "cuda_fp16.h"

inline int host_processors = 4, host_shared_bytes = 99 << 10;  // of the pretended device

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? host_processors : host_shared_bytes;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  memset(to, byte, bytes);
  return cudaSuccess;
}

template <class T>
T atomicMin(T* address, T x) {
  const T old = *address;
  *address = min(old, x);
  return old;
}
template <class T>
T atomicAdd(T* address, T x) {
  const T old = *address;
  *address += x;
  return old;
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __float2half2_rn(float x) { return {__float2half_rn(x), __float2half_rn(x)}; }
inline __half2 __low2half2(__half2 a) { return {a.x, a.x}; }
inline __half2 __high2half2(__half2 a) { return {a.y, a.y}; }
inline __half2 __lowhigh2highlow(__half2 a) { return {a.y, a.x}; }
inline float __low2float(__half2 a) { return __half2float(a.x); }
inline __half2 __hsub2(__half2 a, __half2 b) {
  return {half_of(double_of(a.x) - double_of(b.x)), half_of(double_of(a.y) - double_of(b.y))};
}
inline __half2 __hmul2(__half2 a, __half2 b) {
  return {half_of(double_of(a.x) * double_of(b.x)), half_of(double_of(a.y) * double_of(b.y))};
}
inline __half2 __hmin2(__half2 a, __half2 b) {
  return {a.x.value < b.x.value ? a.x : b.x, a.y.value < b.y.value ? a.y : b.y};
}

#include "cuda/encode.cu"

using namespace exl3;

extern "C" {

// Returns the launcher's error. open: tiles that a second search closed, of a single search.
int host_encode(int codebook, int bits, const float* tiles, int64_t n, uint64_t workspace_bytes,
                int processors, int shared_bytes, uint16_t* states, float* values, int* open) {
  host_processors = processors;
  host_shared_bytes = shared_bytes;
  std::vector<uint4> workspace(workspace_bytes / sizeof(uint4), uint4{~0u, ~0u, ~0u, ~0u});
  const cudaError_t error = cuda::encode_tiles(codebook, bits, tiles, n, workspace.data(),
                                               workspace_bytes, states, values, nullptr);
  *open = workspace.empty() ? 0 : static_cast<int>(workspace[0].x);
  return error;
}

float host_largest(int codebook) { return cuda::kCodebook[codebook].largest; }

uint64_t host_encode_workspace(int64_t n, int bits) { return cuda::encode_workspace(n, bits); }
}
