// Packed trellises back to the matrix that they encode.
#pragma once

#include <cstdint>

#include "cpu/codebook.hpp"

namespace exl3 {

// trellis (tile_rows, tile_columns, 16 * bits) -> float16 bits (16 * tile_rows, 16 * tile_columns).
void decode_trellis(Codebook codebook, int bits, const int16_t* trellis, int64_t tile_rows,
                    int64_t tile_columns, int threads, uint16_t* out);

}  // namespace exl3
