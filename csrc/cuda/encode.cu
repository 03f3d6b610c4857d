#include "cuda/encode.hpp"

#include "cuda/encode_forward.cuh"
#include "cuda/encode_trace.cuh"
#include "cuda/launch.hpp"

namespace exl3::cuda {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kMostRows = size_t{1} << 30;  // bytes of kept rows: a few tiles for every SM
constexpr int kMostTogether = 16;              // tiles of a block

constexpr size_t aligned(size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

constexpr int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The count of open tiles and their numbers.
constexpr size_t list_bytes(int64_t tiles) {
  return aligned(sizeof(int32_t)) + aligned(static_cast<size_t>(tiles) * sizeof(int32_t));
}

struct Device {
  int processors, shared_bytes;
};

cudaError_t current_device(Device* device) {
  int number;
  cudaError_t error = cudaGetDevice(&number);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&device->processors, cudaDevAttrMultiProcessorCount, number);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                number);
}

// Tiles a block takes so that `count` are done soonest. A block fills its processor and walks its
// tiles in turns; what it does once a step costs about an eighth of a tile's step.
int tiles_together(int64_t count, const Device& device, size_t tile_bytes) {
  int best = 1;
  int64_t soonest = INT64_MAX;
  for (int tiles = 1; tiles <= kMostTogether && tiles * tile_bytes <= size_t(device.shared_bytes);
       ++tiles) {
    const int64_t time = over(over(count, tiles), device.processors) * (8 * tiles + 1);
    if (time < soonest) {
      soonest = time;
      best = tiles;
    }
  }
  return best;
}

template <int K>
cudaError_t search(Round round, int64_t n, int64_t capacity, cudaStream_t stream) {
  Device device;
  cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(round.open_count, 0, sizeof(int32_t), stream);
  // Rounds that leave no multiprocessor idle at the end, if there are several.
  const int64_t most = device.processors * tiles_together(INT32_MAX, device, forward_bytes<K>(1));
  if (capacity > most) capacity -= capacity % most;
  // As many rounds for the open tiles as if all were: their number is known on the device only,
  // where blocks without one end at once.
  const int64_t share = over(n, over(n, capacity));
  for (int held = 0; held < 2; ++held) {
    for (int64_t first = 0; first < n && error == cudaSuccess; first += share) {
      round.held = held;
      round.first = static_cast<int32_t>(first);
      round.count = static_cast<int32_t>(n - first < share ? n - first : share);
      // Few tiles stay open.
      const int together = held ? 1 : tiles_together(round.count, device, forward_bytes<K>(1));
      const int64_t blocks = over(round.count, together);
      error = launch(forward_kernel<K>, dim3(static_cast<unsigned>(blocks)), kSearchers,
                     static_cast<int>(forward_bytes<K>(together)), stream, round, together);
      if (error != cudaSuccess) return error;
      const auto trace = round.codebook.kind == Kind::halves ? trace_kernel<K, Kind::halves>
                                                             : trace_kernel<K, Kind::bytes>;
      error = launch(trace, dim3(static_cast<unsigned>(round.count)), kTracers,
                     static_cast<int>(sizeof(TraceMemory<K>)), stream, round);
    }
  }
  return error;
}

template <int K>
constexpr size_t slot_bytes() {
  return kSlot<K> * sizeof(uint16_t);
}

struct Size {
  size_t slot;
  cudaError_t (*search)(Round, int64_t, int64_t, cudaStream_t);
};
constexpr Size kSizes[9] = {
    {},
    {slot_bytes<1>(), search<1>}, {slot_bytes<2>(), search<2>}, {slot_bytes<3>(), search<3>},
    {slot_bytes<4>(), search<4>}, {slot_bytes<5>(), search<5>}, {slot_bytes<6>(), search<6>},
    {slot_bytes<7>(), search<7>}, {slot_bytes<8>(), search<8>},
};

}  // namespace

size_t encode_workspace(int64_t tiles, int bits) {
  if (bits < 1 || bits > 8 || tiles <= 0) return 0;
  const size_t slot = kSizes[bits].slot;
  const size_t most = kMostRows / slot, wanted = static_cast<size_t>(tiles);
  return list_bytes(tiles) + slot * (wanted < most ? wanted : most);
}

cudaError_t encode_tiles(int codebook, int bits, const float* tiles, int64_t n, void* workspace,
                         size_t workspace_bytes, uint16_t* states, float* values,
                         cudaStream_t stream) {
  if (bits < 1 || bits > 8 || codebook < 0 || codebook >= kCodebooks) return cudaErrorInvalidValue;
  if (n < 0 || n > INT32_MAX) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  const Size& size = kSizes[bits];
  const size_t list = list_bytes(n);
  if (workspace_bytes < list + size.slot) return cudaErrorInvalidValue;
  auto* bytes = static_cast<char*>(workspace);
  Round round{};
  round.codebook = kCodebook[codebook];
  round.tiles = tiles;
  round.states = states;
  round.values = values;
  round.open_count = reinterpret_cast<int32_t*>(bytes);
  round.open = reinterpret_cast<int32_t*>(bytes + aligned(sizeof(int32_t)));
  round.rows = reinterpret_cast<uint16_t*>(bytes + list);
  const int64_t capacity = static_cast<int64_t>((workspace_bytes - list) / size.slot);
  return size.search(round, n, capacity, stream);
}

}  // namespace exl3::cuda
