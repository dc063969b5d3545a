// Rows W[o, :, :] of any layout and dtype as contiguous rows of the compute type, and what both operations share.
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
  const int64_t bytes = input_major ? half_second_level_cache() : kTileBytes;
  const int64_t rows = bytes / (layer.columns() * size_of_number);
  return std::min(most, std::max<int64_t>(input_major ? 8 : 64, (rows + 7) / 8 * 8));
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

// Copies numbers between a strided layer and contiguous channel-major rows.
template <class Number, bool kToRows>
void move_strided(const Layer& layer, void* strided, int64_t row, int64_t count, void* rows) {
  Number* base = static_cast<Number*>(strided) + row * layer.stride_out;
  Number* packed = static_cast<Number*>(rows);
  const auto move = [](Number* in_layer, Number* in_row) {
    kToRows ? void(*in_row = *in_layer) : void(*in_layer = *in_row);
  };
  bool whole_kernels = true;  // as transposed convolutions have them
  for (int64_t k = 0; k < layer.kernel; ++k) whole_kernels &= layer.kernel_offsets[k] == k;
  for (int64_t i = 0; i < layer.c_in; ++i) {
    Number* channel = base + i * layer.stride_in;
    Number* target = packed + i * layer.kernel;
    if (whole_kernels) {
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t k = 0; k < layer.kernel; ++k)
          move(channel + j * layer.stride_out + k, target + j * layer.columns() + k);
      }
    } else {
      for (int64_t k = 0; k < layer.kernel; ++k) {
        for (int64_t j = 0; j < count; ++j) {
          move(channel + layer.kernel_offsets[k] + j * layer.stride_out, target + k + j * layer.columns());
        }
      }
    }
  }
}

template <bool kToRows>
void move_strided(const Layer& layer, void* strided, DType type, int64_t row, int64_t count, void* rows) {
  switch (element_size(type)) {
    case 2:
      return move_strided<uint16_t, kToRows>(layer, strided, row, count, rows);
    case 4:
      return move_strided<uint32_t, kToRows>(layer, strided, row, count, rows);
    default:
      return move_strided<uint64_t, kToRows>(layer, strided, row, count, rows);
  }
}

// Room for a block of rows on its way between memory and the compute type.
template <class T>
struct RowBuffer {
  T* numbers;      // kMaxBlockRows rows of the compute type
  std::byte* raw;  // as many of the storage type

  static int64_t bytes(int64_t columns) { return 2 * Workspace::bytes<double>(kMaxBlockRows * columns); }
  void take(Workspace& workspace, int64_t columns) {
    numbers = reinterpret_cast<T*>(workspace.take<double>(kMaxBlockRows * columns));
    raw = reinterpret_cast<std::byte*>(workspace.take<double>(kMaxBlockRows * columns));
  }
};

template <class T>
bool direct(const Layer& layer, DType type) {
  return type == kDType<T> && layer.order != Order::strided;
}

// Points rows[0..count) to rows row.. of the tensor at `base`, in place where it can be.
template <class T>
void read_rows(const Layer& layer, const void* base, DType type, int64_t row, int64_t count, const RowBuffer<T>& buffer,
               const T** rows) {
  const int64_t n = row_size(layer);
  const std::byte* source = static_cast<const std::byte*>(base) + row * n * element_size(type);
  if (layer.order == Order::strided) {
    move_strided<true>(layer, const_cast<void*>(base), type, row, count, buffer.raw);
    source = buffer.raw;
  }
  const bool convert = type != kDType<T>;
  if (convert) kernels<T>().load(source, type, count * n, buffer.numbers);
  const T* first = convert ? buffer.numbers : reinterpret_cast<const T*>(source);
  for (int64_t j = 0; j < count; ++j) rows[j] = first + j * n;
}

// Writes `count` contiguous rows to the tensor at `base`, whose rows are not of the compute type or not contiguous.
template <class T>
void write_rows(const Layer& layer, const RowBuffer<T>& buffer, int64_t row, int64_t count, DType type, void* base) {
  const int64_t n = layer.columns();
  if (layer.order != Order::strided) {
    std::byte* target = static_cast<std::byte*>(base) + row * n * element_size(type);
    kernels<T>().store(buffer.numbers, count * n, type, target);
    return;
  }
  const bool convert = type != kDType<T>;
  if (convert) kernels<T>().store(buffer.numbers, count * n, type, buffer.raw);
  move_strided<false>(layer, base, type, row, count, convert ? static_cast<void*>(buffer.raw) : buffer.numbers);
}

// v in the memory order of the rows: in place for channel-major rows, else in `room`.
template <class T>
const T* in_row_order(const Layer& layer, const void* v, T* room) {
  const T* source = static_cast<const T*>(v);
  if (!kernel_major(layer)) return source;
  for (int64_t i = 0; i < layer.c_in; ++i) {
    for (int64_t k = 0; k < layer.kernel; ++k) room[k * layer.c_in + i] = source[i * layer.kernel + k];
  }
  return room;
}

// One value for each channel of a row's columns, as the kernels want it: repeated for each kernel position, but for
// kernel-major rows.
template <class T>
const T* over_columns(const Layer& layer, const T* channels, int64_t count, T* room) {
  if (channels == nullptr || kernel_major(layer)) return channels;
  for (int64_t i = 0; i < count; ++i) std::fill_n(room + i * layer.kernel, layer.kernel, channels[i]);
  return room;
}

// Whether the outputs of a call are so large that writing past the caches leaves them to what is read again.
bool exceeds_last_level_cache(int64_t bytes);

// Threads worth starting for so much memory to read.
inline int useful_threads(int threads, int64_t bytes) {
  return int(std::max<int64_t>(1, std::min<int64_t>(threads, bytes / (32 * 1024))));
}

}  // namespace bssn::cpu
