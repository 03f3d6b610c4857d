// Registers the CUDA kernels of the ops that exl3/ops.py defines: checks, memory, device, stream.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "cuda/decode.hpp"
#include "cuda/encode.hpp"
#include "cuda/hadamard.hpp"
#include "cuda/linear.hpp"

namespace exl3::cuda {
namespace {

int codebook_id(std::string_view name) {
  if (name == "3inst") return 0;
  if (name == "mcg") return 1;
  TORCH_CHECK(name == "mul1", "unknown codebook '", name, "', not 3inst, mcg or mul1");
  return 2;
}

void check(cudaError_t error, const char* op) {
  TORCH_CHECK(error == cudaSuccess, op, " failed on the GPU: ", cudaGetErrorString(error),
              ". If no kernel was built for this chip, name it in TORCH_CUDA_ARCH_LIST and build "
              "exl3 anew.");
}

// The tensor as the kernels read it: contiguous, from a multiple of 16 bytes on.
at::Tensor readable(const at::Tensor& tensor) {
  const at::Tensor in = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(in.const_data_ptr()) % 16 == 0 ? in : in.clone();
}

int trellis_bits(const at::Tensor& trellis) {
  TORCH_CHECK(trellis.dim() == 3 && trellis.size(2) >= 16 && trellis.size(2) <= 128 &&
                  trellis.size(2) % 16 == 0,
              "trellis must be (in/16, out/16, 16 * bits), not ", trellis.sizes());
  TORCH_CHECK(trellis.scalar_type() == at::kShort, "trellis must be int16, not ",
              trellis.scalar_type());
  return static_cast<int>(trellis.size(2) / 16);
}

// A scale or bias (size,), which must be where the call's first tensor is; undefined for none.
at::Tensor readable_scale(const std::optional<at::Tensor>& scale, const at::Tensor& first,
                          int64_t size, const char* name) {
  if (!scale.has_value()) return {};
  TORCH_CHECK(scale->dim() == 1 && scale->size(0) == size && scale->scalar_type() == at::kHalf,
              name, " must be float16 (", size, "), not ", scale->scalar_type(), " ",
              scale->sizes());
  TORCH_CHECK(scale->device() == first.device(), name, " is on ", scale->device(), ", not on ",
              first.device());
  return readable(*scale);
}

const void* data(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

at::Tensor bytes(size_t size, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(size)}, like.options().dtype(at::kByte));
}

std::tuple<at::Tensor, at::Tensor> encode_tiles_op(const at::Tensor& tiles, int64_t bits,
                                                   std::string_view codebook, int64_t) {
  TORCH_CHECK(bits >= 1 && bits <= 8, "bits must be 1 to 8, not ", bits);
  TORCH_CHECK(tiles.dim() == 2 && tiles.size(1) == 256, "tiles must be (n, 256), not ",
              tiles.sizes());
  TORCH_CHECK(tiles.scalar_type() == at::kFloat, "tiles must be float32, not ",
              tiles.scalar_type());
  const c10::cuda::CUDAGuard guard(tiles.device());
  const at::Tensor in = readable(tiles);
  at::Tensor values = at::empty_like(in);
  at::Tensor states = at::empty(in.sizes(), in.options().dtype(at::kShort));
  const at::Tensor workspace = bytes(encode_workspace(in.size(0), static_cast<int>(bits)), in);
  check(encode_tiles(codebook_id(codebook), static_cast<int>(bits), in.const_data_ptr<float>(),
                     in.size(0), workspace.data_ptr(), workspace.nbytes(),
                     static_cast<uint16_t*>(states.data_ptr()), values.data_ptr<float>(),
                     c10::cuda::getCurrentCUDAStream()),
        "encode_tiles");
  return {values, states};
}

at::Tensor decode_trellis_op(const at::Tensor& trellis, std::string_view codebook, int64_t) {
  const c10::cuda::CUDAGuard guard(trellis.device());
  const at::Tensor in = readable(trellis);
  const int bits = trellis_bits(in);
  at::Tensor out = at::empty({in.size(0) * 16, in.size(1) * 16}, in.options().dtype(at::kHalf));
  check(decode_trellis(codebook_id(codebook), bits, data(in), in.size(0), in.size(1),
                       out.data_ptr(), c10::cuda::getCurrentCUDAStream()),
        "decode_trellis");
  return out;
}

at::Tensor hadamard_128_op(const at::Tensor& x, const std::optional<at::Tensor>& before,
                           const std::optional<at::Tensor>& after, int64_t) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) % 128 == 0,
              "the last dimension must be a multiple of 128, not ", x.sizes());
  const bool is_half = x.scalar_type() == at::kHalf;
  TORCH_CHECK(is_half || x.scalar_type() == at::kFloat, "x must be float32 or float16, not ",
              x.scalar_type());
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor in = readable(x);
  const int64_t columns = in.size(-1), rows = columns == 0 ? 0 : in.numel() / columns;
  const at::Tensor first = readable_scale(before, in, columns, "before");
  const at::Tensor last = readable_scale(after, in, columns, "after");
  at::Tensor out = at::empty_like(in);
  check(hadamard_128(data(in), is_half, data(first), data(last), rows, columns, out.data_ptr(),
                     c10::cuda::getCurrentCUDAStream()),
        "hadamard_128");
  return out;
}

at::Tensor decode_weight_op(const at::Tensor& trellis, const at::Tensor& suh, const at::Tensor& svh,
                            std::string_view codebook, at::ScalarType dtype, int64_t) {
  TORCH_CHECK(dtype == at::kHalf || dtype == at::kFloat, "W is float32 or float16, not ", dtype);
  const c10::cuda::CUDAGuard guard(trellis.device());
  const at::Tensor in = readable(trellis);
  const int bits = trellis_bits(in);
  TORCH_CHECK(in.size(0) % 8 == 0 && in.size(1) % 8 == 0,
              "both dimensions must be multiples of 128, trellis is ", in.sizes());
  const at::Tensor by_rows = readable_scale(suh, in, in.size(0) * 16, "suh");
  const at::Tensor by_columns = readable_scale(svh, in, in.size(1) * 16, "svh");
  at::Tensor out = at::empty({in.size(0) * 16, in.size(1) * 16}, in.options().dtype(dtype));
  check(decode_weight(codebook_id(codebook), bits, data(in), data(by_rows), data(by_columns),
                      in.size(0), in.size(1), dtype == at::kHalf, out.data_ptr(),
                      c10::cuda::getCurrentCUDAStream()),
        "decode_weight");
  return out;
}

at::Tensor fused_linear_op(const at::Tensor& x, const at::Tensor& trellis, const at::Tensor& suh,
                           const at::Tensor& svh, const std::optional<at::Tensor>& bias,
                           std::string_view codebook, int64_t) {
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor in = readable(x), packed = readable(trellis);
  const int bits = trellis_bits(packed);
  const int64_t inputs = packed.size(0) * 16, outputs = packed.size(1) * 16;
  TORCH_CHECK(inputs > 0 && outputs > 0 && inputs % 128 == 0 && outputs % 128 == 0,
              "both dimensions must be multiples of 128, trellis is ", packed.sizes());
  TORCH_CHECK(in.dim() == 2 && in.size(1) == inputs && in.scalar_type() == at::kHalf,
              "x must be float16 (rows, ", inputs, "), not ", in.scalar_type(), " ", in.sizes());
  TORCH_CHECK(in.size(0) <= kLinearRows, "x may have ", kLinearRows, " rows, not ", in.size(0));
  TORCH_CHECK(packed.device() == in.device(), "trellis is on ", packed.device(), ", x on ",
              in.device());
  const at::Tensor by_inputs = readable_scale(suh, in, inputs, "suh");
  const at::Tensor by_outputs = readable_scale(svh, in, outputs, "svh");
  const at::Tensor added = readable_scale(bias, in, outputs, "bias");
  at::Tensor y = at::empty({in.size(0), outputs}, in.options());
  const at::Tensor workspace = bytes(linear_workspace(in.size(0), inputs, outputs), in);
  check(linear(codebook_id(codebook), bits, data(in), data(packed), data(by_inputs),
               data(by_outputs), data(added), in.size(0), inputs, outputs, workspace.data_ptr(),
               workspace.nbytes(), y.data_ptr(), c10::cuda::getCurrentCUDAStream()),
        "fused_linear");
  return y;
}

}  // namespace
}  // namespace exl3::cuda

TORCH_LIBRARY_IMPL(exl3, CUDA, m) {
  m.impl("encode_tiles", &exl3::cuda::encode_tiles_op);
  m.impl("decode_trellis", &exl3::cuda::decode_trellis_op);
  m.impl("hadamard_128", &exl3::cuda::hadamard_128_op);
  m.impl("decode_weight", &exl3::cuda::decode_weight_op);
  m.impl("fused_linear", &exl3::cuda::fused_linear_op);
}
