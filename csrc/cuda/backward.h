// The backward pass, G being the gradient of the normalised weight:
//
//   dW = g (G - <G, W> / sigma S),   S = u_out v_out, or half of (u_out v_out + u_in v_in)
//
// g is the weight's multiplier; a gain's gradient is <G, W> / sigma, and where a bound is slack, dW = G. Phase 0 adds
// up <G, W> where it is needed, and the last tile of a layer makes its record; phase 1 writes.
#pragma once

#include "backward_keeping.h"
#include "tickets.h"

namespace bssn::cuda {

// The elements of a tile that goes through memory in order.
struct FlatTile {
  uint32_t first, end;

  BSSN_HD FlatTile(uint32_t elements, const BackwardLayer& layer, uint32_t tile) {
    first = tile * elements;
    end = layer.size - first < elements ? layer.size : first + elements;
  }
};

// A thread's part of <G, W> over elements [first, end) in memory order, as far as they form pieces of aligned memory;
// `first` becomes what is left.
template <class W, class G>
BSSN_HD double dot_pieces(const W* weight, const G* grad, uint32_t& first, uint32_t end, int thread) {
  constexpr int kPiece = kBackwardPiece, kAhead = 4;
  using WeightPiece = Pack<W, kPiece>;
  using GradPiece = Pack<G, kPiece>;
  const WeightPiece* const weights = reinterpret_cast<const WeightPiece*>(weight);
  const GradPiece* const grads = reinterpret_cast<const GradPiece*>(grad);
  double total = 0;
  if (!is_aligned(weights) || !is_aligned(grads)) return total;
  const uint32_t pieces_end = end / kPiece;
  BSSN_UNROLL_BY(1)
  for (uint32_t x = first / kPiece + thread; x < pieces_end; x += kBackwardThreads * kAhead) {
    WeightPiece w[kAhead];
    GradPiece g[kAhead];
    BSSN_UNROLL
    for (int a = 0; a < kAhead; ++a) {
      w[a] = load_streaming(weights + lesser(x + a * kBackwardThreads, pieces_end - 1));
      g[a] = grads[lesser(x + a * kBackwardThreads, pieces_end - 1)];
    }
    BSSN_UNROLL
    for (int a = 0; a < kAhead; ++a) {
      if (x + a * kBackwardThreads < pieces_end) {
        float sum = 0;
        BSSN_UNROLL
        for (int j = 0; j < kPiece; ++j) sum += w[a].get(j) * g[a].get(j);
        total += sum;
      }
    }
  }
  first = pieces_end * kPiece;
  return total;
}

// A thread's part of <G, W> over a tile in memory order.
template <class W>
BSSN_HD double dot_elements(const BackwardLayer& layer, int32_t grad_type, FlatTile tile, int thread) {
  const W* const weight = static_cast<const W*>(layer.weight);
  double total = 0;
  with_element_type(grad_type, [&](auto element) {
    using G = decltype(element);
    total = dot_pieces(weight, static_cast<const G*>(layer.grad), tile.first, tile.end, thread);
  });
  BSSN_UNROLL_BY(1)
  for (uint32_t x = tile.first + thread; x < tile.end; x += kBackwardThreads) {
    with_element_type(grad_type, [&](auto element) {
      total += to_float(weight[x]) * to_float(static_cast<const decltype(element)*>(layer.grad)[x]);
    });
  }
  return total;
}

// S at one element, or twice that in two directions. What a direction needs that the layer does not have is loaded all
// the same: without branches the loads of several elements are under way at a time.
BSSN_HD float direction_at(const BackwardLayer& layer, const Place& place) {
  const auto element = [&](int vector) { return layer.vectors[vector][place.in(layer, vector)]; };
  const float ab = element(0) * element(1), cd = element(2) * element(3);
  return (layer.has(0) ? ab : 0.0f) + (layer.has(2) ? cd : 0.0f);
}

// Writes the elements of a tile in memory order, of any layer.
template <class W>
BSSN_HD void write_elements(const BackwardLayer& layer, int32_t grad_type, const BackwardRecord& record, FlatTile tile,
                            int thread) {
  constexpr int kAhead = 2;
  const float multiplier = record.multiplier, ratio = layer.two_sided() ? 0.5f * record.ratio : record.ratio;
  W* const output = static_cast<W*>(layer.output);
  BSSN_UNROLL_BY(1)
  for (uint32_t x = tile.first + thread; x < tile.end; x += kBackwardThreads * kAhead) {
    float g[kAhead], s[kAhead];
    with_element_type(grad_type, [&](auto element) {
      const auto* const grad = static_cast<const decltype(element)*>(layer.grad);
      BSSN_UNROLL
      for (int a = 0; a < kAhead; ++a) g[a] = to_float(grad[lesser(x + a * kBackwardThreads, tile.end - 1)]);
    });
    BSSN_UNROLL
    for (int a = 0; a < kAhead; ++a) {
      s[a] = direction_at(layer, Place(layer, lesser(x + a * kBackwardThreads, tile.end - 1)));
    }
    BSSN_UNROLL
    for (int a = 0; a < kAhead; ++a) {
      const uint32_t at = x + a * kBackwardThreads;
      if (at < tile.end) from_float(multiplier * (g[a] - ratio * s[a]), output[at]);
    }
  }
}

// has: whether the block has kept rows of the tile. It writes these; all others are for the tile's ticket.
template <class W, class Block>
BSSN_HD void write_tile(Block& block, const BackwardCall& call, const BackwardLayer& layer, int index, uint32_t tile,
                        bool has) {
  const bool by_rows = layer.rows.column_blocks > 0;
  const uint32_t* const is_recorded = counter_of(call.counters, index, recorded);
  uint32_t written = 0;  // of a thread's rows, by the block that has them
  if (layer.keeps() && !has) {
    block.wait(is_recorded, 1);  // whoever finds that this ticket has passed may count on the record
    if (!layer.slack() && block.exchange(call.claim(layer, tile), passed) != dropped) written = layer.kept_steps;
    if (written * layer.rows.rows_at_once >= layer.rows.tile_rows) return;
  }
  typename Block::template PerThread<GradientColumns> columns;
  // Before the wait, so that G is on its way meanwhile.
  block.prepare([&](int thread) {
    GradientColumns& my = columns[thread];
    my = GradientColumns{};
    if (!by_rows) return;
    my.take_place(layer, tile, thread);
    if (has) my.end = lesser(my.end, my.row + layer.kept_steps * my.step);
    my.row += written * my.step;
    if (!has) my.load_rows<kRowsAhead>(layer, call.grad_type);
    my.load_vectors(layer);
  });
  block.wait(is_recorded, 1);
  block.all([&](int thread) {
    const BackwardRecord record = call.records[index];
    GradientColumns& my = columns[thread];
    if (!by_rows) {
      write_elements<W>(layer, call.grad_type, record, FlatTile(call.write_elements, layer, tile), thread);
      return;
    }
    my.scale(layer, record);
    const void* grads = block.template shared<unsigned char>(kBackwardShared);
    uint32_t at = kept_at(0, thread), distance = kept_at(1, 0);
    if (!has) {
      with_element_type(call.grad_type,
                        [&](auto element) { write_rows<W, decltype(element)>(layer, record.multiplier, my); });
      grads = layer.grad;
      at = my.row * layer.row_pieces() + my.piece;
      distance = my.step * layer.row_pieces();
    }
    write_each_row<W>(layer, call.grad_type, record.multiplier, my, grads, at, distance);
  });
}

// Adds up a number of each thread, value(thread); use(sum) is called by thread 0 alone, for which no other has to wait.
template <class Block, class Value, class Use>
BSSN_HD void sum_threads(Block& block, Value value, Use use) {
  double* const parts = block.template shared<double>(kWarpSumsAt);
  block.template sum_lanes<double, 1, 1>([&](int thread, double* x) { x[0] = value(thread); },
                                         [&](int warp) { return parts + warp; });
  block.sync();
  block.lead([&] {
    double sum = 0;
    BSSN_UNROLL
    for (int warp = 0; warp < kBackwardThreads / 32; ++warp) sum += parts[warp];
    use(sum);
  });
}

template <class Block>
BSSN_HD void finish_gradient_layer(Block& block, const BackwardCall& call, const BackwardLayer& layer, int index) {
  const auto sum_of_tiles = [&](int thread) {
    double sum = 0;
    BSSN_UNROLL_BY(4)
    for (uint32_t x = thread; x < layer.dot_tiles; x += kBackwardThreads) sum += call.sums[layer.sums + x];
    return sum;
  };
  sum_threads(block, sum_of_tiles, [&](double total) {
    const float sigma = *layer.sigma;
    const float ratio = sigma == 0.0f || layer.slack() ? 0.0f : float(total * double(1.0f / sigma));
    call.records[index] = {multiplier(layer.number, layer.law, sigma), ratio};
    if (LawKind(layer.law) == LawKind::gain) call.grad_gains[layer.grad_gain] = ratio;
  });
  block.publish(counter_of(call.counters, index, recorded));
}

template <class W, class Block>
BSSN_HD void dot_tile(Block& block, const BackwardCall& call, const BackwardLayer& layer, int index, uint32_t tile) {
  const bool is_slack = layer.slack();
  const auto part = [&](int thread) {
    if (is_slack) return 0.0;
    if (!layer.keeps()) {
      return dot_elements<W>(layer, call.grad_type, FlatTile(call.dot_elements, layer, tile), thread);
    }
    GradientColumns my = {};
    my.take_place(layer, tile, thread);
    return dot_rows<W>(block, layer, call.grad_type, my, thread);
  };
  sum_threads(block, part, [&](double total) { call.sums[layer.sums + tile] = total; });
  if (layer.keeps() && !is_slack) keep(block, index, tile);
  const uint32_t before = block.arrive(counter_of(call.counters, index, power_done));
  if (before + 1 == layer.dot_tiles) finish_gradient_layer(block, call, layer, index);
}

// A tile of a segment; or in its place, if the block has kept one, the rows of that.
template <class W, class Block, class Args>
BSSN_HD void backward_tile(Block& block, const Args& args, Segment segment, uint32_t place, const Kept& kept) {
  const bool has = kept.layer > 0;
  const int index = has ? int(kept.layer) - 1 : segment.layer();
  const BackwardLayer& layer = args.layers[index];
  if (has || segment.phase() == subtract) {
    // From its end: see order_backward.h.
    write_tile<W>(block, args.call, layer, index, has ? kept.tile : layer.write_tiles - 1 - place, has);
  } else {
    const uint32_t before = segment.phase() == dot_rest ? layer.first_dot_tiles : 0;
    dot_tile<W>(block, args.call, layer, index, before + place);
  }
}

// What a block does: takes tickets until none is left. Before one of them it may have to write what it has kept; then
// the same ticket is handed out again.
template <class W, class Block, class Args>
BSSN_HD void run_backward_block(Block& block, const Args& args) {
  const BackwardCall& call = args.call;
  uint32_t* const counter = call.counters + call.ticket_counter;
  keep_nothing(block);
  block.ask_for_ticket(counter);
  uint32_t ticket = call.first_ticket + block.hand_out_ticket();
  for (;;) {
    const Segment segment = segment_of(args.segments, call.n_segments, ticket);
    const Kept kept = take_kept(block, args, ticket, segment);
    if (kept.layer == 0) {
      if (ticket >= call.end_ticket) return;
      block.ask_for_ticket(counter);
    }
    backward_tile<W>(block, args, segment, ticket - segment.first, kept);
    ticket = call.first_ticket + block.hand_out_ticket();
  }
}

}  // namespace bssn::cuda
