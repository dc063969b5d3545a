// The normalised weight: W times a number, out of memory or out of shared memory.
#pragma once

#include "forward_args.h"

namespace bssn::cuda {

// Scales elements [first, end) in memory order, which W and the result share. Aligned: in pieces of 16 bytes of W.
template <class W, class N>
BSSN_HD void scale_elements(const W* weight, N* output, float multiplier, uint32_t first, uint32_t end, int thread) {
  constexpr int kPiece = 16 / int(sizeof(W)), kAhead = 16;
  using Source = Pack<W, kPiece>;
  using Target = Pack<N, kPiece>;
  uint32_t done = first;
  if (is_aligned(reinterpret_cast<const Source*>(weight)) && is_aligned(reinterpret_cast<Target*>(output))) {
    const Source* const from = reinterpret_cast<const Source*>(weight);
    Target* const to = reinterpret_cast<Target*>(output);
    const uint32_t pieces_end = end / kPiece;  // tiles begin at multiples of a piece
    BSSN_UNROLL_BY(1)
    for (uint32_t x = first / kPiece + thread; x < pieces_end; x += kThreads * kAhead) {
      Source loaded[kAhead];
      BSSN_UNROLL
      for (int a = 0; a < kAhead; ++a) loaded[a] = load_once(from + lesser(x + a * kThreads, pieces_end - 1));
      BSSN_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        if (x + a * kThreads < pieces_end) {
          Target scaled;
          BSSN_UNROLL
          for (int j = 0; j < kPiece; ++j) scaled.set(j, loaded[a].get(j) * multiplier);
          store_once(to + x + a * kThreads, scaled);
        }
      }
    }
    done = pieces_end * kPiece;
  }
  BSSN_UNROLL_BY(1)
  for (uint32_t x = done + thread; x < end; x += kThreads) from_float(to_float(weight[x]) * multiplier, output[x]);
}

// Scales rows that lie in shared memory, `size` elements from a multiple of 16 bytes on and a multiple of them.
template <class W, class N>
BSSN_HD void scale_staged(const W* staged, N* output, float multiplier, uint32_t size, int thread) {
  constexpr int kPiece = 16 / int(sizeof(W));
  using Source = Pack<W, kPiece>;
  using Target = Pack<N, kPiece>;
  if (!is_aligned(reinterpret_cast<Target*>(output))) {
    BSSN_UNROLL_BY(1)
    for (uint32_t x = uint32_t(thread); x < size; x += kThreads)
      from_float(to_float(staged[x]) * multiplier, output[x]);
    return;
  }
  BSSN_UNROLL_BY(2)
  for (uint32_t x = uint32_t(thread); x < size / kPiece; x += kThreads) {
    const Source loaded = reinterpret_cast<const Source*>(staged)[x];
    Target scaled;
    BSSN_UNROLL
    for (int j = 0; j < kPiece; ++j) scaled.set(j, loaded.get(j) * multiplier);
    store_once(reinterpret_cast<Target*>(output) + x, scaled);
  }
}

}  // namespace bssn::cuda
