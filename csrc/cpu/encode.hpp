// The trellis search: for each tile the legal circle of 256 states whose values are nearest to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "cpu/codebook.hpp"
#include "cpu/plan.hpp"

namespace exl3 {

// The search compiled for one instruction set. All give the same states; only their speed differs.
struct Kernels {
  const char* name;
  bool (*supported)();
  int together;  // tiles that are searched side by side
  // Each by number of bits; [0] is unused.
  void (*arrange[9])(const int16_t* by_state, int16_t* in_order);
  size_t workspace_bytes[9];
  // tiles (count, 256) -> states (count, 256).
  void (*encode[9])(const SearchTables& tables, const float* tiles, int64_t count,
                    uint16_t* states, std::byte* workspace);
};

extern const Kernels kPortable;
#if defined(__x86_64__) && defined(__GNUC__)
#define EXL3_X86 1
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// The fastest kernels of this machine, or those that the environment variable EXL3_ISA names.
const Kernels& kernels();

// tiles (count, 256) -> the nearest circle's states and their values, both (count, 256).
void encode_tiles(Codebook codebook, int bits, const float* tiles, int64_t count, int threads,
                  uint16_t* states, float* values);

// The same search in two passes, in float, without any of the tricks: the benchmark's baseline.
void encode_tiles_scalar(Codebook codebook, int bits, const float* tiles, int64_t count,
                         uint16_t* states);

}  // namespace exl3
