// G that stays in shared memory from <G, W> to the write of dW, so that it is read once: of layers whose gradient is
// written by rows.
//
// Their tiles of both phases are the same. A thread of the first keeps its pieces of as many of its rows as there is
// room for, the first ones, in places that no other thread uses: no barrier lies between writing and reading them. The
// block goes on with tickets that need no such room. Before one that does, and at the end, it writes dW of what it has
// kept: see kept.h. The tile's ticket of the second phase writes the other rows.
#pragma once

#include "backward_rows.h"
#include "kept.h"

namespace bssn::cuda {

// Rows that a thread loads at a time to keep them. Fewer where the compiler makes longer code of all the rest.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ >= 1000)
constexpr uint32_t kDotAhead = 2;
#else
constexpr uint32_t kDotAhead = 4;
#endif

// Where a thread's n-th row of G is kept.
BSSN_HD uint32_t kept_at(uint32_t n, int thread) { return n * kBackwardThreads + uint32_t(thread); }

// A thread's part of <G, W> over its rows of a tile.
template <class W, class Block>
BSSN_HD double dot_rows(Block& block, const BackwardLayer& layer, int32_t grad_type, GradientColumns& my, int thread) {
  using WeightPiece = Pack<W, kBackwardPiece>;
  const WeightPiece* const weights = my.piece_of<W>(layer.weight, layer, 0);
  double total = 0;
  BSSN_UNROLL_BY(1)
  for (uint32_t n = 0; my.row < my.end; my.row += kDotAhead * my.step, n += kDotAhead) {
    WeightPiece w[kDotAhead];
    BSSN_UNROLL
    for (uint32_t a = 0; a < kDotAhead; ++a) {
      w[a] = load_streaming(weights + lesser(my.row + a * my.step, my.end - 1) * layer.row_pieces());
    }
    my.load_rows<kDotAhead>(layer, grad_type);
    with_piece_type(grad_type, [&](auto element) {
      using Piece = Pack<decltype(element), kBackwardPiece>;
      Piece* const kept = block.template shared<Piece>(kBackwardShared);
      BSSN_UNROLL
      for (uint32_t a = 0; a < kDotAhead; ++a) {
        if (n + a < layer.kept_steps) kept[kept_at(n + a, thread)] = piece_in<decltype(element)>(my.rows[a]);
      }
    });
    float sums[kDotAhead] = {};
    with_element_type(grad_type, [&](auto element) {
      BSSN_UNROLL
      for (uint32_t a = 0; a < kDotAhead; ++a) {
        const auto g = piece_in<decltype(element)>(my.rows[a]);
        BSSN_UNROLL
        for (int j = 0; j < kBackwardPiece; ++j) sums[a] += w[a].get(j) * g.get(j);
      }
    });
    BSSN_UNROLL
    for (uint32_t a = 0; a < kDotAhead; ++a) {
      if (my.row + a * my.step < my.end) total += sums[a];
    }
  }
  return total;
}

// Whether a segment's tickets are nothing for a block that keeps rows of a layer: its tiles need the room, or are to
// write that layer or a later one. The write of earlier layers fills the time until this one's record is there.
template <class Layers>
BSSN_HD bool ends_keeping(const Layers& layers, Segment segment, int kept_layer) {
  return segment.phase() == subtract ? segment.layer() >= kept_layer : layers[segment.layer()].keeps();
}

// What the block has to write before it goes on with a ticket: something that it keeps, whose record is there, or
// nothing. The block keeps nothing then.
template <class Block, class Args>
BSSN_HD Kept take_kept(Block& block, const Args& args, uint32_t ticket, Segment segment) {
  const BackwardCall& call = args.call;
  const Kept kept = what_is_kept(block), nothing = {0, 0, 0};
  const int index = int(kept.layer) - 1;
  if (index < 0 || !(ticket >= call.end_ticket || ends_keeping(args.layers, segment, index))) return nothing;
  const BackwardLayer& layer = args.layers[index];
  const bool has_record = get_record(block, ticket, layer.summed_by, counter_of(call.counters, index, recorded),
                                     call.claim(layer, kept.tile));
  keep_nothing(block);
  return has_record ? kept : nothing;
}

}  // namespace bssn::cuda
