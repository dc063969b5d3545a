// The backward pass, G being the gradient of the normalised weight:
//
//   dW = g (G - <G, W> / sigma S),   S = u_out v_out, or half of (u_out v_out + u_in v_in)
//
// g is the weight's multiplier; a gain's gradient is <G, W> / sigma, and where a bound is slack, dW = G. Phase 0 adds
// up <G, W> where it is needed, and the last tile of a layer makes its record; phase 1 writes.
#pragma once

#include "backward_args.h"
#include "forward.h"

namespace bssn::cuda {

constexpr int kBackwardPiece = 4;  // elements that a thread loads at a time

// A thread's part of <G, W> over elements [first, end) in memory order.
template <class W, class G>
BSSN_HD double dot_elements(const W* weight, const G* grad, uint32_t first, uint32_t end, int thread) {
  constexpr int kPiece = kBackwardPiece, kAhead = sizeof(W) + sizeof(G) > 4 ? 2 : 4;
  using WeightPiece = Pack<W, kPiece>;
  using GradPiece = Pack<G, kPiece>;
  uint32_t done = first;
  double total = 0;
  if (is_aligned(reinterpret_cast<const WeightPiece*>(weight)) &&
      is_aligned(reinterpret_cast<const GradPiece*>(grad))) {
    const WeightPiece* const weights = reinterpret_cast<const WeightPiece*>(weight);
    const GradPiece* const grads = reinterpret_cast<const GradPiece*>(grad);
    const uint32_t pieces_end = end / kPiece;
    BSSN_UNROLL_BY(1)
    for (uint32_t x = first / kPiece + thread; x < pieces_end; x += kBackwardThreads * kAhead) {
      WeightPiece w[kAhead];
      GradPiece g[kAhead];
      BSSN_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        w[a] = load_once(weights + lesser(x + a * kBackwardThreads, pieces_end - 1));
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
    done = pieces_end * kPiece;
  }
  BSSN_UNROLL_BY(1)
  for (uint32_t x = done + thread; x < end; x += kBackwardThreads) total += to_float(weight[x]) * to_float(grad[x]);
  return total;
}

// An element's coordinates, dimension 0 being the one with stride 1.
struct Place {
  uint32_t x0, x1, x2;

  BSSN_HD Place(const BackwardLayer& layer, uint32_t element) {
    const uint32_t lines = layer.inner(element);
    x2 = layer.plane(element);
    x1 = lines - x2 * layer.middle;
    x0 = element - lines * layer.inner.value;
  }

  BSSN_HD void to_next(const BackwardLayer& layer) {
    if (++x0 < layer.inner.value) return;
    x0 = 0;
    if (++x1 < layer.middle) return;
    x1 = 0;
    ++x2;
  }

  BSSN_HD float in(const BackwardLayer& layer, int vector) const {
    const uint32_t* const step = layer.steps[vector];
    return layer.vectors[vector][x0 * step[0] + x1 * step[1] + x2 * step[2]];
  }
};

// S at one element.
BSSN_HD float direction_at(const BackwardLayer& layer, const Place& place) {
  const float out_side = place.in(layer, 0) * place.in(layer, 1);
  return layer.two_sided() ? 0.5f * (out_side + place.in(layer, 2) * place.in(layer, 3)) : out_side;
}

template <class W, class G>
BSSN_HD void write_gradient(const BackwardLayer& layer, const BackwardRecord& record, uint32_t first, uint32_t end,
                            int thread) {
  constexpr int kPiece = kBackwardPiece, kAhead = 2;
  using GradPiece = Pack<G, kPiece>;
  using OutputPiece = Pack<W, kPiece>;
  const G* const grad = static_cast<const G*>(layer.grad);
  W* const output = static_cast<W*>(layer.output);
  const float multiplier = record.multiplier, ratio = record.ratio;
  const auto value = [&](float g, const Place& place) { return multiplier * (g - ratio * direction_at(layer, place)); };
  uint32_t done = first;
  if (is_aligned(reinterpret_cast<const GradPiece*>(grad)) && is_aligned(reinterpret_cast<OutputPiece*>(output))) {
    const GradPiece* const grads = reinterpret_cast<const GradPiece*>(grad);
    OutputPiece* const outputs = reinterpret_cast<OutputPiece*>(output);
    const uint32_t pieces_end = end / kPiece;
    BSSN_UNROLL_BY(1)
    for (uint32_t x = first / kPiece + thread; x < pieces_end; x += kBackwardThreads * kAhead) {
      GradPiece g[kAhead];
      BSSN_UNROLL
      for (int a = 0; a < kAhead; ++a) g[a] = load_once(grads + lesser(x + a * kBackwardThreads, pieces_end - 1));
      BSSN_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        if (x + a * kBackwardThreads < pieces_end) {
          OutputPiece result;
          Place place(layer, (x + a * kBackwardThreads) * kPiece);
          BSSN_UNROLL
          for (int j = 0; j < kPiece; ++j) {
            result.set(j, value(g[a].get(j), place));
            place.to_next(layer);
          }
          store_once(outputs + x + a * kBackwardThreads, result);
        }
      }
    }
    done = pieces_end * kPiece;
  }
  BSSN_UNROLL_BY(1)
  for (uint32_t x = done + thread; x < end; x += kBackwardThreads)
    from_float(value(to_float(grad[x]), Place(layer, x)), output[x]);
}

template <class Block>
BSSN_HD void finish_gradient_layer(Block& block, const BackwardCall& call, const BackwardLayer& layer, int index) {
  const double* const totals = block_sums<1>(block, [&](int thread, double* sums) {
    for (uint32_t x = thread; x < layer.tiles; x += kBackwardThreads) sums[0] += call.sums[layer.sums + x];
  });
  block.each([&](int thread) {
    if (thread != 0) return;
    const float sigma = *layer.sigma;
    const float ratio = sigma == 0.0f || layer.slack() ? 0.0f : float(totals[0] / double(sigma));
    call.records[index] = {multiplier(layer.number, layer.law, sigma), ratio};
    if (LawKind(layer.law) == LawKind::gain) call.grad_gains[layer.grad_gain] = ratio;
  });
  block.publish(counter_of(call.counters, index, recorded));
}

template <class W, class Block>
BSSN_HD void dot_tile(Block& block, const BackwardCall& call, const BackwardLayer& layer, int index, uint32_t tile,
                      uint32_t first, uint32_t end) {
  const double* const totals = block_sums<1>(block, [&](int thread, double* sums) {
    if (layer.slack()) return;
    with_element_type(call.grad_type, [&](auto element) {
      using G = decltype(element);
      const W* const weight = static_cast<const W*>(layer.weight);
      sums[0] = dot_elements(weight, static_cast<const G*>(layer.grad), first, end, thread);
    });
  });
  block.each([&](int thread) {
    if (thread == 0) call.sums[layer.sums + tile] = totals[0];
  });
  const uint32_t before = block.arrive(counter_of(call.counters, index, power_done));
  if (before + 1 == layer.tiles) finish_gradient_layer(block, call, layer, index);
}

template <class W, class Block, class Args>
BSSN_HD void backward_ticket(Block& block, const Args& args, uint32_t ticket) {
  const BackwardCall& call = args.call;
  const Segment segment = segment_of(args.segments, call.n_segments, ticket);
  const int index = segment.layer();
  const BackwardLayer& layer = args.layers[index];
  // The gradient is written from its end: what was read last is the likeliest to be in the cache still.
  const bool writes = segment.phase() == 1;
  const uint32_t tile = writes ? layer.tiles - 1 - (ticket - segment.first) : ticket - segment.first;
  const uint32_t first = tile * call.tile_elements;
  const uint32_t end = layer.size - first < call.tile_elements ? layer.size : first + call.tile_elements;
  if (!writes) {
    dot_tile<W>(block, call, layer, index, tile, first, end);
    return;
  }
  block.wait(counter_of(call.counters, index, recorded), 1);
  block.each([&](int thread) {
    with_element_type(call.grad_type, [&](auto element) {
      using G = decltype(element);
      write_gradient<W, G>(layer, call.records[index], first, end, thread);
    });
  });
}

}  // namespace bssn::cuda
