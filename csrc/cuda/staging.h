// How rows come into shared memory, and how a thread takes neighbouring elements of them.
#pragma once

#include "forward_args.h"

namespace bssn::cuda {

// Copies `rows` rows of a weight whose rows follow each other in memory. The copy keeps the original's offset
// from a multiple of 16 bytes, whatever that is, so that all but its ends moves in pieces of 16 bytes. V > 1: it is 0,
// and so is what is left at the end.
template <class W, int V>
BSSN_HD void stage_rows(const ForwardLayer& layer, uint32_t first, int rows, unsigned char* stage, int thread) {
  constexpr int kPiece = 16 / int(sizeof(W));
  const W* const source = static_cast<const W*>(layer.weight) + int64_t(first) * layer.row();
  const int size = rows * layer.row();
  W* const target = reinterpret_cast<W*>(stage);
  if constexpr (V > 1) {
    constexpr int kAll = kThreads * kPiece;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    constexpr int kAtOnce = 1;  // copies pass through registers
#else
    constexpr int kAtOnce = 4;
#endif
    const W* from = source + thread * kPiece;
    W* to = target + thread * kPiece;
    int left = size - thread * kPiece;
    BSSN_UNROLL_BY(1)
    for (; left > (kAtOnce - 1) * kAll; left -= kAtOnce * kAll, from += kAtOnce * kAll, to += kAtOnce * kAll) {
      BSSN_UNROLL
      for (int j = 0; j < kAtOnce; ++j) copy16(to + j * kAll, from + j * kAll);
    }
    BSSN_UNROLL_BY(1)
    for (; left > 0; left -= kAll, from += kAll, to += kAll) copy16(to, from);
    return;
  }
  const int shift = int(reinterpret_cast<uintptr_t>(source) % 16 / sizeof(W));
  BSSN_UNROLL_BY(1)
  for (int x = thread * kPiece - shift; x < size; x += kThreads * kPiece) {
    if (x >= 0 && x + kPiece <= size) {
      copy16(target + shift + x, source + x);
    } else {
      BSSN_UNROLL_BY(1)
      for (int j = x < 0 ? 0 : x; j < x + kPiece && j < size; ++j) target[shift + j] = source[j];
    }
  }
}

// Puts rows together whose elements lie anywhere, as those of transposed convolutions do. Neighbouring threads take
// what lies together: an input channel's kernel positions, row after row, or where rows are closer a position of all
// rows.
template <class W>
BSSN_HD void gather_rows(const ForwardLayer& layer, uint32_t first, int rows, unsigned char* stage, int thread) {
  const int piece = layer.pieces ? 16 / int(sizeof(W)) : 1, kernel_pieces = layer.kernel / piece;
  const int of_channel = rows * kernel_pieces, threads = of_channel < kThreads ? kThreads / of_channel : 1;
  const int i0 = of_channel < kThreads ? thread / of_channel : 0;
  const bool rows_together = layer.stride_out < layer.stride_kernel;
  const W* const source = static_cast<const W*>(layer.weight);
  W* const target = reinterpret_cast<W*>(stage);
  BSSN_UNROLL_BY(1)
  for (int p = thread - i0 * of_channel; p < of_channel && i0 < threads; p += kThreads) {
    const int row = rows_together ? p % rows : p / kernel_pieces;
    const int k = (rows_together ? p / rows : p - row * kernel_pieces) * piece;
    // A weight has less than 2^31 elements.
    int from = (int(first) + row) * layer.stride_out + i0 * layer.stride_in + k * layer.stride_kernel;
    int to = row * layer.row() + i0 * layer.kernel + k;
    BSSN_UNROLL_BY(1)
    for (int i = i0; i < layer.c_in; i += threads, to += threads * layer.kernel) {
      if (layer.pieces) {
        copy16(target + to, source + from);
      } else {
        copy_element(target + to, source + from);
      }
      from += i + threads < layer.c_in ? threads * layer.stride_in : 0;
    }
  }
}

template <class W>
BSSN_HD const W* staged_rows(const ForwardLayer& layer, uint32_t first, unsigned char* stage) {
  if (layer.gathered) return reinterpret_cast<const W*>(stage);
  const W* const source = static_cast<const W*>(layer.weight) + int64_t(first) * layer.row();
  return reinterpret_cast<const W*>(stage) + reinterpret_cast<uintptr_t>(source) % 16 / sizeof(W);
}

// Begins to copy rows; they are there once the copies have been waited for.
template <class W, int V>
BSSN_HD void begin_rows(const ForwardLayer& layer, uint32_t first, int rows, unsigned char* stage, int thread) {
  if (layer.gathered) {
    gather_rows<W>(layer, first, rows, stage, thread);
  } else {
    stage_rows<W, V>(layer, first, rows, stage, thread);
  }
}

// V neighbouring elements of shared memory as floats.
template <int V, class T>
BSSN_HD void load_pack(const T* from, float* to) {
  if constexpr (V == 1) {
    to[0] = to_float(*from);
  } else {
    const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
    BSSN_UNROLL
    for (int j = 0; j < V; ++j) to[j] = pack.get(j);
  }
}

template <int V>
BSSN_HD void store_pack(const float* from, float* to) {
  if constexpr (V == 1) {
    *to = *from;
  } else {
    Pack<float, V> pack;
    BSSN_UNROLL
    for (int j = 0; j < V; ++j) pack.set(j, from[j]);
    *reinterpret_cast<Pack<float, V>*>(to) = pack;
  }
}

}  // namespace bssn::cuda
