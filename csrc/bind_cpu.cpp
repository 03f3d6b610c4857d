// Registers the CPU kernels of the ops that exl3/ops.py defines.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "cpu/codebook.hpp"
#include "cpu/decode.hpp"
#include "cpu/encode.hpp"
#include "cpu/hadamard.hpp"

namespace exl3 {
namespace {

void check_tiles(const at::Tensor& tiles, int64_t bits) {
  TORCH_CHECK(bits >= 1 && bits <= 8, "bits must be 1 to 8, not ", bits);
  TORCH_CHECK(tiles.dim() == 2 && tiles.size(1) == kTileLength, "tiles must be (n, 256), not ",
              tiles.sizes());
  TORCH_CHECK(tiles.scalar_type() == at::kFloat, "tiles must be float32, not ",
              tiles.scalar_type());
}

uint16_t* unsigned_data(const at::Tensor& states) {
  return reinterpret_cast<uint16_t*>(states.data_ptr<int16_t>());
}

std::tuple<at::Tensor, at::Tensor> encode_tiles_op(const at::Tensor& tiles, int64_t bits,
                                                   std::string_view codebook, int64_t threads) {
  check_tiles(tiles, bits);
  TORCH_CHECK(threads >= 1 && threads <= 1024, "threads must be 1 to 1024, not ", threads);
  const at::Tensor in = tiles.contiguous();
  at::Tensor values = at::empty(in.sizes(), in.options());
  at::Tensor states = at::empty(in.sizes(), in.options().dtype(at::kShort));
  encode_tiles(codebook_named(codebook), static_cast<int>(bits), in.data_ptr<float>(), in.size(0),
               static_cast<int>(threads), unsigned_data(states), values.data_ptr<float>());
  return {values, states};
}

at::Tensor decode_trellis_op(const at::Tensor& trellis, std::string_view codebook,
                             int64_t threads) {
  TORCH_CHECK(trellis.dim() == 3 && trellis.size(2) >= 16 && trellis.size(2) <= 128 &&
                  trellis.size(2) % 16 == 0,
              "trellis must be (in/16, out/16, 16 * bits), not ", trellis.sizes());
  TORCH_CHECK(trellis.scalar_type() == at::kShort, "trellis must be int16, not ",
              trellis.scalar_type());
  TORCH_CHECK(threads >= 1 && threads <= 1024, "threads must be 1 to 1024, not ", threads);
  const at::Tensor in = trellis.contiguous();
  at::Tensor out =
      at::empty({in.size(0) * 16, in.size(1) * 16}, in.options().dtype(at::kHalf));
  decode_trellis(codebook_named(codebook), static_cast<int>(in.size(2) / 16),
                 in.data_ptr<int16_t>(), in.size(0), in.size(1), static_cast<int>(threads),
                 static_cast<uint16_t*>(out.data_ptr()));
  return out;
}

// A scale (n,) as contiguous float32; an undefined tensor for none.
at::Tensor float_scale(const std::optional<at::Tensor>& scale, int64_t n) {
  if (!scale.has_value()) return {};
  TORCH_CHECK(scale->dim() == 1 && scale->size(0) == n, "a scale must be (", n, "), not ",
              scale->sizes());
  return scale->to(at::kFloat).contiguous();
}

at::Tensor hadamard_128_op(const at::Tensor& x, const std::optional<at::Tensor>& before,
                           const std::optional<at::Tensor>& after, int64_t threads) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) % 128 == 0,
              "the last dimension must be a multiple of 128, not ", x.sizes());
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kHalf,
              "x must be float32 or float16, not ", x.scalar_type());
  TORCH_CHECK(threads >= 1 && threads <= 1024, "threads must be 1 to 1024, not ", threads);
  const at::Tensor in = x.to(at::kFloat).contiguous();
  const at::Tensor scale_in = float_scale(before, x.size(-1));
  const at::Tensor scale_out = float_scale(after, x.size(-1));
  at::Tensor out = at::empty_like(in);
  const int64_t columns = x.size(-1), rows = columns == 0 ? 0 : in.numel() / columns;
  hadamard_128(in.const_data_ptr<float>(),
               scale_in.defined() ? scale_in.const_data_ptr<float>() : nullptr,
               scale_out.defined() ? scale_out.const_data_ptr<float>() : nullptr, rows, columns,
               static_cast<int>(threads), out.data_ptr<float>());
  return out.to(x.scalar_type());
}

at::Tensor encode_tiles_scalar_op(const at::Tensor& tiles, int64_t bits,
                                  std::string_view codebook) {
  check_tiles(tiles, bits);
  const at::Tensor in = tiles.contiguous();
  at::Tensor states = at::empty(in.sizes(), in.options().dtype(at::kShort));
  encode_tiles_scalar(codebook_named(codebook), static_cast<int>(bits), in.data_ptr<float>(),
                      in.size(0), unsigned_data(states));
  return states;
}

}  // namespace
}  // namespace exl3

TORCH_LIBRARY_IMPL(exl3, CPU, m) {
  m.impl("encode_tiles", &exl3::encode_tiles_op);
  m.impl("decode_trellis", &exl3::decode_trellis_op);
  m.impl("hadamard_128", &exl3::hadamard_128_op);
}

// For the benchmark only.
TORCH_LIBRARY(exl3_bench, m) {
  m.def("encode_tiles_scalar(Tensor tiles, int bits, str codebook) -> Tensor",
        &exl3::encode_tiles_scalar_op);
}
