#include "cpu/encode.hpp"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu/cached.hpp"
#include "cpu/threads.hpp"

namespace exl3 {
namespace {

// Fastest first.
constexpr const Kernels* kAll[] = {
#ifdef EXL3_X86
    &kAvx512,
    &kAvx2,
#endif
    &kPortable,
};
constexpr int kAllCount = sizeof kAll / sizeof *kAll;

SearchTables* make_tables(const Kernels& isa, Codebook codebook, int bits) {
  const CodebookValues& values = codebook_values(codebook);
  const Plan& plan = kPlans[bits];
  auto tables = std::make_unique<SearchTables>();
  tables->scale = 32767.0f / (plan.range * values.largest);
  tables->clamp = plan.clamp * values.largest;
  std::vector<int16_t> by_state(kStates);
  for (int state = 0; state < kStates; ++state) {
    by_state[state] = static_cast<int16_t>(std::lrintf(values.value[state] * tables->scale));
    const int high = state >> (16 - bits), node = state & ((kStates >> bits) - 1);
    tables->by_node[node << bits | high] = by_state[state];
  }
  isa.arrange[bits](by_state.data(), tables->in_order);
  return tables.release();
}

const SearchTables& search_tables(const Kernels& isa, Codebook codebook, int bits) {
  static Cached<SearchTables> cache[kAllCount][kCodebooks][9];
  const auto which = std::find(std::begin(kAll), std::end(kAll), &isa) - std::begin(kAll);
  return cache[which][static_cast<int>(codebook)][bits].get(
      [&] { return make_tables(isa, codebook, bits); });
}

// Tiles a thread takes at a time: enough to share tables and to gather those that need a second
// search, few enough that the threads end together.
int64_t chunk_size(int64_t count, int threads, int together) {
  const int64_t share = (count + threads - 1) / threads;
  const int64_t chunk = std::clamp<int64_t>(share / 4, together, 64);
  return std::min(chunk, share);
}

}  // namespace

const Kernels& kernels() {
  // Read at every call, so that a process can compare them.
  const char* wanted = std::getenv("EXL3_ISA");
  for (const Kernels* isa : kAll) {
    if (wanted == nullptr || *wanted == '\0') {
      if (isa->supported()) return *isa;
    } else if (std::string_view(wanted) == isa->name) {
      TORCH_CHECK(isa->supported(), "EXL3_ISA=", wanted, ": this machine does not support it");
      return *isa;
    }
  }
  TORCH_CHECK(false, "EXL3_ISA=", wanted, ": no such kernels; there are avx512, avx2, portable");
}

void encode_tiles(Codebook codebook, int bits, const float* tiles, int64_t count, int threads,
                  uint16_t* states, float* values) {
  const Kernels& isa = kernels();
  if (count == 0) return;
  const SearchTables& tables = search_tables(isa, codebook, bits);
  const auto& value = codebook_values(codebook).value;
  parallel_chunks(
      count, chunk_size(count, threads, isa.together), threads, [&](int64_t first, int64_t last) {
        uint16_t* out = states + first * kTileLength;
        isa.encode[bits](tables, tiles + first * kTileLength, last - first, out,
                         thread_workspace(isa.workspace_bytes[bits]));
        std::transform(out, states + last * kTileLength, values + first * kTileLength,
                       [&](uint16_t state) { return value[state]; });
      });
}

}  // namespace exl3
