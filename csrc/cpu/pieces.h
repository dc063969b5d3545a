// Pieces of rows, so that what a thread needs does not grow with a row's length.
#pragma once

#include "rows.h"

namespace bssn::cpu {

constexpr int64_t kPieceColumns = 32 * 1024;
constexpr int64_t kLongKernel = 1024;  // above it the kernels' running sums for each position would leave the caches

// Some channels, each with some kernel positions, that follow one another in the order of a row's columns. A row is one
// piece, or in many: whole channels; of kernel-major layers, channels of one position; of a long kernel, positions of
// one channel. The latter two have no further order; the columns of the first are channel-major.
struct Piece {
  int64_t first;  // column
  int64_t channel, channels, position, positions;
  bool kernel_major;  // more than one position, and all channels of a position together
  bool long_kernel;

  int64_t size() const { return channels * positions; }
};

// What follows `row_count` in memory are these times the kernel: input channels, or output channels of input-major
// ones.
inline int64_t channels_of_row(const Layer& layer) { return row_size(layer) / layer.kernel; }

inline bool in_one_piece(const Layer& layer) { return row_size(layer) <= kPieceColumns && layer.kernel <= kLongKernel; }

template <class Use>
void for_pieces(const Layer& layer, Use use) {
  const int64_t channels = channels_of_row(layer), kernel = layer.kernel;
  if (in_one_piece(layer)) {
    use(Piece{0, 0, channels, 0, kernel, kernel_major(layer), false});
  } else if (kernel_major(layer)) {
    for (int64_t k = 0; k < kernel; ++k) {
      add_tiles(channels, kPieceColumns,
                [&](int64_t i, int64_t end) { use(Piece{k * channels + i, i, end - i, k, 1, false, false}); });
    }
  } else if (kernel <= kLongKernel) {
    add_tiles(channels, kPieceColumns / kernel,
              [&](int64_t i, int64_t end) { use(Piece{i * kernel, i, end - i, 0, kernel, false, false}); });
  } else {
    for (int64_t i = 0; i < channels; ++i) {
      add_tiles(kernel, kPieceColumns,
                [&](int64_t k, int64_t end) { use(Piece{i * kernel + k, i, 1, k, end - k, false, true}); });
    }
  }
}

// Layers that would fall to too small or too large pieces are gathered instead.
inline Order order_of_reading(const Layer& layer) {
  const bool input_major = layer.order == Order::input_major && layer.kernel > kLongKernel;
  const bool narrow = kernel_major(layer) && !in_one_piece(layer) && layer.c_in < 64;
  return input_major || narrow ? Order::strided : layer.order;
}

inline std::vector<Layer> with_geometry(const Geometry* geometry, int64_t n) {
  std::vector<Layer> layers(static_cast<size_t>(n));
  for (int64_t j = 0; j < n; ++j) {
    static_cast<Geometry&>(layers[j]) = geometry[j];
    layers[j].order = order_of_reading(layers[j]);
  }
  return layers;
}

// Copies numbers between a strided layer and contiguous channel-major pieces of rows.
template <class Number, bool kToRows>
void move_strided(const Layer& layer, void* strided, int64_t row, int64_t count, const Piece& piece, void* rows) {
  Number* base = static_cast<Number*>(strided) + row * layer.stride_out + piece.channel * layer.stride_in;
  Number* packed = static_cast<Number*>(rows);
  const int64_t* offsets = layer.kernel_offsets + piece.position;
  const int64_t positions = piece.positions, size = piece.size();
  const auto move = [](Number* in_layer, Number* in_row) {
    kToRows ? void(*in_row = *in_layer) : void(*in_layer = *in_row);
  };
  bool whole_kernels = true;  // as transposed convolutions have them
  for (int64_t k = 0; k < positions; ++k) whole_kernels &= offsets[k] == offsets[0] + k;
  for (int64_t i = 0; i < piece.channels; ++i) {
    Number* channel = base + i * layer.stride_in;
    Number* target = packed + i * positions;
    if (whole_kernels) {
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t k = 0; k < positions; ++k)
          move(channel + j * layer.stride_out + offsets[0] + k, target + j * size + k);
      }
    } else {
      for (int64_t k = 0; k < positions; ++k) {
        for (int64_t j = 0; j < count; ++j) {
          move(channel + offsets[k] + j * layer.stride_out, target + k + j * size);
        }
      }
    }
  }
}

template <bool kToRows>
void move_strided(const Layer& layer, void* strided, DType type, int64_t row, int64_t count, const Piece& piece,
                  void* rows) {
  switch (element_size(type)) {
    case 2:
      return move_strided<uint16_t, kToRows>(layer, strided, row, count, piece, rows);
    case 4:
      return move_strided<uint32_t, kToRows>(layer, strided, row, count, piece, rows);
    default:
      return move_strided<uint64_t, kToRows>(layer, strided, row, count, piece, rows);
  }
}

// Room for pieces of a block of rows on their way between memory and the compute type.
template <class T>
struct RowBuffer {
  T* numbers;      // kMaxBlockRows pieces of the compute type
  std::byte* raw;  // as many of the storage type, which may be the wider one

  static int64_t bytes(int64_t columns) {
    return Workspace::bytes<T>(kMaxBlockRows * columns) + Workspace::bytes<double>(kMaxBlockRows * columns);
  }
  void take(Workspace& workspace, int64_t columns) {
    numbers = workspace.take<T>(kMaxBlockRows * columns);
    raw = reinterpret_cast<std::byte*>(workspace.take<double>(kMaxBlockRows * columns));
  }
};

template <class T>
bool direct(const Layer& layer, DType type) {
  return type == kDType<T> && layer.order != Order::strided;
}

// Points rows[0..count) to the piece of rows row.. of the tensor at `base`, in place where it can be.
template <class T>
void read_rows(const Layer& layer, const void* base, DType type, int64_t row, int64_t count, const Piece& piece,
               const RowBuffer<T>& buffer, const T** rows) {
  const int64_t n = piece.size();
  int64_t distance = row_size(layer);
  const std::byte* source = static_cast<const std::byte*>(base) + (row * distance + piece.first) * element_size(type);
  if (layer.order == Order::strided) {
    move_strided<true>(layer, const_cast<void*>(base), type, row, count, piece, buffer.raw);
    source = buffer.raw;
    distance = n;
  }
  if (type == kDType<T>) {
    for (int64_t j = 0; j < count; ++j) rows[j] = reinterpret_cast<const T*>(source) + j * distance;
    return;
  }
  for (int64_t j = 0; j < count; ++j) rows[j] = buffer.numbers + j * n;
  if (distance == n) return kernels<T>().load(source, type, count * n, buffer.numbers);
  for (int64_t j = 0; j < count; ++j) {
    kernels<T>().load(source + j * distance * element_size(type), type, n, buffer.numbers + j * n);
  }
}

// Writes pieces of `count` rows to the tensor at `base`, whose rows are not of the compute type or not contiguous.
template <class T>
void write_rows(const Layer& layer, const RowBuffer<T>& buffer, int64_t row, int64_t count, const Piece& piece,
                DType type, void* base) {
  const int64_t n = piece.size(), distance = row_size(layer);
  if (layer.order == Order::strided) {
    const bool convert = type != kDType<T>;
    if (convert) kernels<T>().store(buffer.numbers, count * n, type, buffer.raw);
    move_strided<false>(layer, base, type, row, count, piece,
                        convert ? static_cast<void*>(buffer.raw) : buffer.numbers);
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    const int64_t first = (row + j) * distance + piece.first;
    kernels<T>().store(buffer.numbers + j * n, n, type, static_cast<std::byte*>(base) + first * element_size(type));
  }
}

// A piece of v in the memory order of the rows: in place for channel-major rows, else in `room`.
template <class T>
const T* in_row_order(const Layer& layer, const Piece& piece, const void* v, T* room) {
  const T* source = static_cast<const T*>(v);
  if (!kernel_major(layer)) return source + piece.first;
  for (int64_t i = 0; i < piece.channels; ++i) {
    for (int64_t k = 0; k < piece.positions; ++k) {
      room[k * piece.channels + i] = source[(piece.channel + i) * layer.kernel + piece.position + k];
    }
  }
  return room;
}

// One value for each channel of a piece, as the kernels want it: repeated for each kernel position where they are
// together. Of a long kernel it is one number.
template <class T>
const T* over_columns(const Piece& piece, const T* channels, T* room) {
  if (channels == nullptr || piece.kernel_major || piece.positions == 1 || piece.long_kernel) {
    return channels == nullptr ? nullptr : channels + piece.channel;
  }
  for (int64_t i = 0; i < piece.channels; ++i) {
    std::fill_n(room + i * piece.positions, piece.positions, channels[piece.channel + i]);
  }
  return room;
}

}  // namespace bssn::cpu
