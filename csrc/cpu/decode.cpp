#include "cpu/decode.hpp"

#include "cpu/threads.hpp"

namespace exl3 {
namespace {

constexpr int kTile = 16;  // rows and columns of a tile

// Value 8 * t + m stands at row 2 * (t % 4) + kRow[m], column t / 4 + kColumn[m].
constexpr int kRow[8] = {0, 1, 8, 9, 0, 1, 8, 9};
constexpr int kColumn[8] = {0, 0, 0, 0, 8, 8, 8, 8};

// One tile, packed -> values by state at `out`, whose rows are `stride` apart.
void decode_tile(const uint16_t* half, int bits, const int16_t* packed, uint16_t* out,
                 int64_t stride) {
  // The string's 16-bit chunks in order (they are stored with the halves of each 32-bit word
  // swapped), after its last one, for the first states reach back into the end of the circle.
  const int chunks = kTile * bits;
  uint32_t string[1 + kTile * 8 + 1];
  for (int i = 0; i < chunks; ++i) string[1 + i] = static_cast<uint16_t>(packed[i ^ 1]);
  string[0] = string[chunks];
  string[chunks + 1] = 0;  // read but not used by the last state
  for (int i = 0; i < kTileLength; ++i) {
    const int start = (i + 1) * bits;  // first bit of the state, in `string`
    const uint32_t pair = string[start / 16] << 16 | string[start / 16 + 1];
    const uint32_t state = pair >> (16 - start % 16) & 0xFFFF;
    const int t = i / 8, m = i % 8;
    out[(2 * (t % 4) + kRow[m]) * stride + t / 4 + kColumn[m]] = half[state];
  }
}

}  // namespace

void decode_trellis(Codebook codebook, int bits, const int16_t* trellis, int64_t tile_rows,
                    int64_t tile_columns, int threads, uint16_t* out) {
  const uint16_t* half = codebook_values(codebook).half.data();
  const int64_t stride = tile_columns * kTile;
  parallel_chunks(tile_rows, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      for (int64_t j = 0; j < tile_columns; ++j) {
        decode_tile(half, bits, trellis + (i * tile_columns + j) * kTile * bits,
                    out + i * kTile * stride + j * kTile, stride);
      }
    }
  });
}

}  // namespace exl3
