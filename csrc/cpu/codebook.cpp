#include "cpu/codebook.hpp"

#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>

#include "cpu/cached.hpp"

namespace exl3 {
namespace {

double half_from_bits(uint32_t bits) {
  return c10::Half(static_cast<uint16_t>(bits), c10::Half::from_bits());
}

// Low and high 16 bits, masked, as float16 numbers: their sum (exact in double).
double sum_of_halves(uint32_t x) {
  x = (x & 0x8FFF8FFFu) ^ 0x3B603B60u;
  return half_from_bits(x & 0xFFFF) + half_from_bits(x >> 16);
}

// fma(half(0x6400 + sum of the bytes), half(0x1EEE), half(0xC931)) (exact in double).
double sum_of_bytes(uint32_t x) {
  const uint32_t sum = (x & 0xFF) + (x >> 8 & 0xFF) + (x >> 16 & 0xFF) + (x >> 24);
  return half_from_bits(0x6400u + sum) * half_from_bits(0x1EEE) + half_from_bits(0xC931);
}

double exact_value(Codebook codebook, uint32_t state) {
  switch (codebook) {
    case Codebook::inst3:
      return sum_of_halves(state * 89226354u + 64248484u);
    case Codebook::mcg:
      return sum_of_halves(state * 0xCBAC1FEDu);
    default:
      return sum_of_bytes(state * 0x83DCD12Du);
  }
}

CodebookValues* make_values(Codebook codebook) {
  auto* values = new CodebookValues;
  values->largest = 0;
  for (uint32_t state = 0; state < kStates; ++state) {
    // Both exact values have fewer than 24 significant bits, so only the cast to half rounds.
    const c10::Half rounded(static_cast<float>(exact_value(codebook, state)));
    values->half[state] = rounded.x;
    values->value[state] = rounded;
    values->largest = std::max(values->largest, std::abs(values->value[state]));
  }
  return values;
}

}  // namespace

Codebook codebook_named(std::string_view name) {
  if (name == "3inst") return Codebook::inst3;
  if (name == "mcg") return Codebook::mcg;
  TORCH_CHECK(name == "mul1", "unknown codebook '", name, "', not 3inst, mcg or mul1");
  return Codebook::mul1;
}

const CodebookValues& codebook_values(Codebook codebook) {
  static Cached<CodebookValues> cache[kCodebooks];
  return cache[static_cast<int>(codebook)].get([codebook] { return make_values(codebook); });
}

}  // namespace exl3
