// The plain search that the kernels are compared with: two passes, float costs, stored back
// pointers, one branch at a time.
#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/encode.hpp"

namespace exl3 {
namespace {

class ScalarSearch {
 public:
  ScalarSearch(const float* value, int bits)
      : value_(value),
        bits_(bits),
        nodes_(kStates >> bits),
        cost_(nodes_),
        next_(nodes_),
        high_(static_cast<size_t>(kTileLength) * nodes_) {}

  void encode(const float* tile, uint16_t* states) {
    // A free pass from half way round finds the seam, a second one is held to it.
    std::fill(cost_.begin(), cost_.end(), 0.0f);
    forward(tile, kTileLength / 2);
    const auto cheapest = std::min_element(cost_.begin(), cost_.end()) - cost_.begin();
    trace(static_cast<int>(cheapest), kTileLength / 2, states);
    const int seam = states[kTileLength - 1] & (nodes_ - 1);
    std::fill(cost_.begin(), cost_.end(), std::numeric_limits<float>::infinity());
    cost_[seam] = 0;
    forward(tile, 0);
    trace(seam, 0, states);
  }

 private:
  void forward(const float* tile, int start) {
    for (int i = 0; i < kTileLength; ++i) {
      const float target = tile[(start + i) % kTileLength];
      uint8_t* chosen = &high_[static_cast<size_t>(i) * nodes_];
      for (int node = 0; node < nodes_; ++node) {
        float best = std::numeric_limits<float>::infinity();
        int best_high = 0;
        for (int high = 0; high < 1 << bits_; ++high) {
          const int state = high << (16 - bits_) | node;
          const float error = value_[state] - target;
          const float cost = cost_[state >> bits_] + error * error;
          if (cost < best) {
            best = cost;
            best_high = high;
          }
        }
        next_[node] = best;
        chosen[node] = static_cast<uint8_t>(best_high);
      }
      cost_.swap(next_);
    }
  }

  void trace(int node, int start, uint16_t* states) const {
    for (int i = kTileLength - 1; i >= 0; --i) {
      const int high = high_[static_cast<size_t>(i) * nodes_ + node];
      const int state = high << (16 - bits_) | node;
      states[(start + i) % kTileLength] = static_cast<uint16_t>(state);
      node = state >> bits_;
    }
  }

  const float* value_;
  int bits_, nodes_;
  std::vector<float> cost_, next_;
  std::vector<uint8_t> high_;  // of the state that leads to each node, at each step
};

}  // namespace

void encode_tiles_scalar(Codebook codebook, int bits, const float* tiles, int64_t count,
                         uint16_t* states) {
  ScalarSearch search(codebook_values(codebook).value.data(), bits);
  for (int64_t i = 0; i < count; ++i)
    search.encode(tiles + i * kTileLength, states + i * kTileLength);
}

}  // namespace exl3
