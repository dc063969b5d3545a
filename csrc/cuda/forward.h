// The forward pass's other two phases, and what a ticket stands for.
#pragma once

#include "directions.h"
#include "power_split.h"

namespace bssn::cuda {

// Makes the record of a layer whose sums are complete.
template <class Block>
BSSN_HD void finish_layer(Block& block, const ForwardCall& call, const ForwardLayer& layer, int index) {
  const double* const sums_of_tiles = call.sums + layer.sums;
  const double* const totals = block_sums<kSums>(block, [&](int thread, double* sums) {
    for (uint32_t x = thread; x < layer.tiles[reduce]; x += kThreads) {
      for (int j = 0; j < kSums; ++j) sums[j] += sums_of_tiles[x * kSums + j];
    }
  });
  // Square roots and divisions in double take long: the two sides' at the same time, in two warps.
  Direction* const sides = block.template shared<Direction>(kAreaAt);
  block.each([&](int thread) {
    if (thread == 0 || thread == 32) sides[thread / 32] = direction_of(call, totals, thread / 32);
  });
  block.each([&](int thread) {
    if (thread == 0) call.records[index] = record_of(call, layer, sides);
  });
  block.publish(counter_of(call.counters, index, recorded));
}

// Squares of s and q, and their products with the stored vectors.
template <class Block>
BSSN_HD const double* sums_of_firsts(Block& block, const ForwardLayer& layer, uint32_t tile) {
  const Span span = layer.firsts_of(tile);
  const uint32_t c_out = uint32_t(layer.c_out);
  return block_sums<kSums>(block, [&](int thread, double* sums) {
    BSSN_UNROLL_BY(kFirsts / kThreads)
    for (uint32_t j = uint32_t(thread); j < span.end - span.first; j += kThreads) {
      const uint32_t x = span.first + j;
      const bool is_s = x < c_out;
      const uint32_t at = is_s ? x : x - c_out;
      const int vector = is_s ? 0 : 3;
      const double value = layer.snapshot[vector][at], square = value * value;
      const double product = value * layer.vectors[vector][at];
      sums[0] += is_s ? square : 0.0;
      sums[1] += is_s ? product : 0.0;
      sums[2] += is_s ? 0.0 : square;
      sums[3] += is_s ? 0.0 : product;
    }
  });
}

// Elements of t and r, summed over the power tiles in order, go to the snapshot as raw vectors; their squares.
template <class Block>
BSSN_HD const double* sums_of_columns(Block& block, const ForwardCall& call, const ForwardLayer& layer, uint32_t tile) {
  const int row = layer.row(), size = row + (layer.two_sided() ? layer.c_in : 0);
  const int slices = layer.slices, quads = kThreads / slices, elements = 4 * quads, first = int(tile) * elements;
  const uint32_t shares = layer.tiles[power], share_size = layer.slot_size();
  const float* const slots = call.slot(layer, 0);
  float* const parts = block.template shared<float>(kLanesAt);  // [slices][elements]
  static_assert(kLanesAt + 4 * kThreads * sizeof(float) <= kResultsAt, "shared memory");
  struct Squares {
    double t, r;
  };
  typename Block::template PerThread<Squares> squares;
  block.each([&](int thread) {
    const int quad = thread % quads, slice = thread / quads, x = first + 4 * quad;
    float sum[4] = {};
    if (x + 4 <= size) {
      BSSN_UNROLL_BY(8)
      for (uint32_t share = slice; share < shares; share += slices) {
        const Pack<float, 4> pack = block.load_l2(slots + uint64_t(share) * share_size + x);
        for (int j = 0; j < 4; ++j) sum[j] += pack.get(j);
      }
    } else {
      for (uint32_t share = slice; share < shares; share += slices) {
        for (int j = 0; j < 4; ++j) {
          if (x + j < size) sum[j] += slots[uint64_t(share) * share_size + x + j];
        }
      }
    }
    for (int j = 0; j < 4; ++j) parts[4 * thread + j] = sum[j];
  });
  block.each([&](int thread) {
    squares[thread] = {0.0, 0.0};
    BSSN_UNROLL_BY(1)
    for (int e = thread; e < elements && first + e < size; e += kThreads) {
      const int x = first + e;
      float sum = 0;
      for (int slice = 0; slice < slices; ++slice) sum += parts[slice * elements + e];
      const double square = double(sum) * sum;
      if (x < row) {
        const int transposed = layer.kernel_major ? x % layer.c_in * layer.kernel + x / layer.c_in : x;
        layer.snapshot[1][transposed] = sum;
        squares[thread].t += square;
      } else {
        layer.snapshot[2][x - row] = sum;
        squares[thread].r += square;
      }
    }
  });
  return block_sums<kSums>(block, [&](int thread, double* mine) {
    mine[4] = squares[thread].t;
    mine[5] = squares[thread].r;
  });
}

template <class W, class Block>
BSSN_HD void reduce_tile(Block& block, const ForwardCall& call, const ForwardLayer& layer, int index, uint32_t tile) {
  block.wait(counter_of(call.counters, index, power_done), layer.chunks() > 1 ? 1u : layer.tiles[power]);
  const uint32_t first_tiles = layer.first_tiles();
  const double* const sums = tile < first_tiles       ? sums_of_firsts(block, layer, tile)
                             : layer.stage_bytes == 0 ? sums_of_split_columns<W>(block, layer, tile - first_tiles)
                                                      : sums_of_columns(block, call, layer, tile - first_tiles);
  block.each([&](int thread) {
    if (thread < kSums) call.sums[layer.sums + tile * kSums + thread] = sums[thread];
  });
  const uint32_t before = block.arrive(counter_of(call.counters, index, reduce_done));
  if (before + 1 == layer.tiles[reduce]) finish_layer(block, call, layer, index);
}

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

// A tile's part of vector j: scaled if the power iteration gave a usable one, else what was stored.
BSSN_HD void write_vector(const ForwardLayer& layer, int j, int size, bool usable, float factor, uint32_t first,
                          uint32_t step) {
  BSSN_UNROLL_BY(1)
  for (uint32_t x = first; x < uint32_t(size); x += step) {
    if (usable) {
      const float value = layer.snapshot[j][x] * factor;
      layer.snapshot[j][x] = layer.vectors[j][x] = value;
    } else {
      layer.snapshot[j][x] = layer.vectors[j][x];
    }
  }
}

template <class W, class Block>
BSSN_HD void write_tile(Block& block, const ForwardCall& call, const ForwardLayer& layer, int index, uint32_t tile) {
  block.wait(counter_of(call.counters, index, recorded), 1);
  block.each([&](int thread) {
    const Record& record = call.records[index];
    const uint32_t size = uint32_t(layer.c_out) * uint32_t(layer.row()), first = tile * call.write_elements;
    const uint32_t end = size - first < call.write_elements ? size : first + call.write_elements;
    const W* const weight = static_cast<const W*>(layer.weight);
    const float multiplier = record.multiplier;
    if (call.write_output && layer.output != nullptr) {
      with_element_type(call.output_type, [&](auto element) {
        using N = decltype(element);
        scale_elements(weight, static_cast<N*>(layer.output), multiplier, first, end, thread);
      });
    }
    const int sizes[4] = {layer.c_out, layer.row(), layer.c_in, layer.c_out * layer.kernel};
    const uint32_t start = tile * kThreads + thread, step = layer.tiles[write] * kThreads;
    BSSN_UNROLL
    for (int j = 0; j < 4; ++j) {
      if (j < 2 || layer.two_sided()) {
        write_vector(layer, j, sizes[j], record.usable[j / 2], record.factors[j], start, step);
      }
    }
  });
}

template <class W, class Block, class Args>
BSSN_HD void forward_ticket(Block& block, const Args& args, uint32_t ticket) {
  const ForwardCall& call = args.call;
  const Segment segment = segment_of(args.segments, call.n_segments, ticket);
  const int index = segment.layer(), phase = segment.phase();
  const ForwardLayer& layer = args.layers[index];
  const uint32_t tile = ticket - segment.first;
  if (phase == power) {
    power_tile<W>(block, call, layer, index, tile);
  } else if (phase == reduce) {
    reduce_tile<W>(block, call, layer, index, tile);
  } else {
    write_tile<W>(block, call, layer, index, tile);
  }
}

}  // namespace bssn::cuda
