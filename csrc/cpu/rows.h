// What both operations share: sizes, tiles, memory to work in.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"

namespace bssn::cpu {

template <class T>
const Kernels<T>& kernels();  // of the instruction set in use

template <class T>
constexpr DType kDType = sizeof(T) == 8 ? DType::f64 : DType::f32;

inline int64_t element_size(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

inline bool kernel_major(const Layer& layer) { return layer.order == Order::kernel_major; }

// Rows worked on together: while they are in the second-level cache, each of them is read twice. A strided layout
// gathers more of them, for the neighbouring output channels in its cache lines.
inline int64_t block_rows(const Layer& layer) { return layer.order == Order::strided ? 8 : 4; }
constexpr int64_t kMaxBlockRows = 8;

// The addresses of a layer's vectors in a snapshot.
inline void point_to_snapshot(void* snapshot, int64_t size_of_number, Layer& layer) {
  for (int i = 0; i < (layer.two_sided ? 4 : 2); ++i) {
    layer.snapshot[i] = static_cast<std::byte*>(snapshot) + layer.snapshot_offsets[i] * size_of_number;
  }
}

// What is contiguous: W[o, :, :], or for input-major layers W[:, o, :] of one input channel.
inline int64_t row_count(const Layer& layer) { return layer.order == Order::input_major ? layer.c_in : layer.c_out; }
inline int64_t row_size(const Layer& layer) { return layer.size() / row_count(layer); }

// Threads that have nothing left to do at the end then wait for a small layer at most.
inline void largest_first(std::vector<Layer>& layers) {
  std::stable_sort(layers.begin(), layers.end(), [](const Layer& a, const Layer& b) { return a.size() > b.size(); });
}

// Half of a core's second-level cache, within 512 KB and 1 MB.
int64_t half_second_level_cache();

// Tiles of output channels. They do not depend on the number of threads: nor do, then, the results. Each tile adds its
// share of t and r to sums of its own, which costs two rows of traffic: not below 64 rows, but for input-major layers,
// of which a whole tile is read twice and has to stay in the cache.
constexpr int64_t kTileBytes = 256 * 1024;

// A layer that takes no more memory is done by one thread in one go, from the second-level cache of its core.
constexpr int64_t kWholeLayerBytes = 768 * 1024;

constexpr int64_t kMaxTileRows = 1024;  // fp32 sums of more rows lose digits
inline int64_t tile_rows(const Layer& layer, int64_t size_of_number) {
  const int64_t most = std::min(layer.c_out, kMaxTileRows);
  if (layer.size() * size_of_number <= kWholeLayerBytes) return most;
  const bool input_major = layer.order == Order::input_major;
  const int64_t bytes = input_major ? half_second_level_cache() : kTileBytes, row = layer.columns() * size_of_number;
  const bool read_from_cache = input_major && row <= bytes;
  return std::min(most, std::max<int64_t>(read_from_cache ? 8 : 64, (bytes / row + 7) / 8 * 8));
}
inline int64_t tile_count(const Layer& layer, int64_t size_of_number) {
  const int64_t rows = tile_rows(layer, size_of_number);
  return (layer.c_out + rows - 1) / rows;
}
constexpr int64_t kTileElements = 128 * 1024;

template <class Add>
void add_tiles(int64_t size, int64_t step, Add add) {
  for (int64_t begin = 0; begin < size; begin += step) add(begin, std::min(begin + step, size));
}

// Memory that a thread keeps from call to call, so that a step does not pay for fresh pages; contents are arbitrary.
class Workspace {
 public:
  // Raises std::bad_alloc.
  void reserve(int64_t bytes) {
    if (bytes > capacity_) {
      capacity_ = 0;
      memory_.reset();
      memory_.reset(new std::byte[size_t(bytes) + 64]);
      capacity_ = bytes;
    }
    next_ = reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
  }
  template <class U>
  U* take(int64_t count) {
    U* result = reinterpret_cast<U*>(next_);
    next_ += bytes<U>(count);
    return result;
  }
  // What take(count) uses up: whole cache lines and a few more, lest arrays of a power of two, read side by side,
  // compete for the same places in the cache.
  template <class U>
  static int64_t bytes(int64_t count) {
    return (count * int64_t(sizeof(U)) + 63) / 64 * 64 + 5 * 64;
  }

 private:
  std::unique_ptr<std::byte[]> memory_;
  int64_t capacity_ = 0;
  std::byte* next_ = nullptr;
};

// Whether the outputs of a call are so large that writing past the caches leaves them to what is read again.
bool exceeds_last_level_cache(int64_t bytes);

// Threads worth starting for so much memory to read.
inline int useful_threads(int threads, const std::vector<Layer>& layers, DType weight_type) {
  int64_t bytes = 0;
  for (const Layer& layer : layers) bytes += layer.size() * element_size(weight_type);
  return int(std::max<int64_t>(1, std::min<int64_t>(threads, bytes / (32 * 1024))));
}

}  // namespace bssn::cpu
