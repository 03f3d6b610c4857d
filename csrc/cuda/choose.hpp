// From numbers known when the program runs to those that kernels are compiled for.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/decode_tile.cuh"

namespace exl3::cuda {

template <int kNumber>
using Constant = std::integral_constant<int, kNumber>;
template <Kind kKind>
using KindConstant = std::integral_constant<Kind, kKind>;

// run(mix, kind, bits) with the last two as constants; cudaErrorInvalidValue for any others.
template <class Run>
cudaError_t with_bits(int codebook, int bits, Run run) {
  const auto with_kind = [&](auto kind, Mix mix) -> cudaError_t {
    switch (bits) {
      case 1: return run(mix, kind, Constant<1>());
      case 2: return run(mix, kind, Constant<2>());
      case 3: return run(mix, kind, Constant<3>());
      case 4: return run(mix, kind, Constant<4>());
      case 5: return run(mix, kind, Constant<5>());
      case 6: return run(mix, kind, Constant<6>());
      case 7: return run(mix, kind, Constant<7>());
      case 8: return run(mix, kind, Constant<8>());
      default: return cudaErrorInvalidValue;
    }
  };
  switch (codebook) {
    case 0: return with_kind(KindConstant<Kind::halves>(), kCodebook[0].mix);
    case 1: return with_kind(KindConstant<Kind::halves>(), kCodebook[1].mix);
    case 2: return with_kind(KindConstant<Kind::bytes>(), kCodebook[2].mix);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace exl3::cuda
