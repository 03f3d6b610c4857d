// The three codebooks: 16-bit state -> value, in exact float16 arithmetic.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace exl3 {

constexpr int kStates = 1 << 16;
constexpr int kTileLength = 256;

enum class Codebook { inst3, mcg, mul1 };
constexpr int kCodebooks = 3;

// Raises c10::Error for an unknown name.
Codebook codebook_named(std::string_view name);

struct CodebookValues {
  std::array<float, kStates> value;    // exact: every value is a float16
  std::array<uint16_t, kStates> half;  // the same as float16 bit patterns
  float largest;                       // greatest magnitude
};

// Made on first use, kept for the life of the process, safe from any thread.
const CodebookValues& codebook_values(Codebook codebook);

}  // namespace exl3
