// The launchers' names for ctypes, and the tensor core.
#include "cuda/decode.hpp"
#include "cuda/hadamard.hpp"
#include "cuda/linear.hpp"

using namespace exl3;

extern "C" {

int host_decode_trellis(int codebook, int bits, const void* trellis, int64_t rows, int64_t columns,
                        void* out) {
  return cuda::decode_trellis(codebook, bits, trellis, rows, columns, out, nullptr);
}

int host_decode_weight(int codebook, int bits, const void* trellis, const void* suh,
                       const void* svh, int64_t rows, int64_t columns, bool to_half, void* out) {
  return cuda::decode_weight(codebook, bits, trellis, suh, svh, rows, columns, to_half, out,
                             nullptr);
}

int host_hadamard_128(const void* x, bool is_half, const void* before, const void* after,
                      int64_t rows, int64_t columns, void* out) {
  return cuda::hadamard_128(x, is_half, before, after, rows, columns, out, nullptr);
}

uint64_t host_linear_workspace(int64_t rows, int64_t inputs, int64_t outputs) {
  return cuda::linear_workspace(rows, inputs, outputs);
}

int host_linear(int codebook, int bits, const void* x, const void* trellis, const void* suh,
                const void* svh, const void* bias, int64_t rows, int64_t inputs, int64_t outputs,
                void* workspace, uint64_t workspace_bytes, void* y) {
  return cuda::linear(codebook, bits, x, trellis, suh, svh, bias, rows, inputs, outputs, workspace,
                      workspace_bytes, y, nullptr);
}
}
