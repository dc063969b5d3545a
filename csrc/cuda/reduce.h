// The forward pass's second phase: sums over the power tiles, and a layer's record.
#pragma once

#include "directions.h"
#include "power_split.h"

namespace bssn::cuda {

// Calls f(record, sigma) in one thread. sides: room for two, in shared memory.
template <class Block, class F>
BSSN_HD void make_record(Block& block, const ForwardCall& call, const ForwardLayer& layer, const double* totals,
                         Direction* sides, F f) {
  // Square roots and divisions in double take long: the two sides' at the same time, in two warps.
  block.each([&](int thread) {
    if (thread == 0 || thread == 32) sides[thread / 32] = direction_of(call, totals, thread / 32);
  });
  block.each([&](int thread) {
    if (thread > 0) return;
    float sigma;
    const Record record = record_of(layer, sides, sigma);
    f(record, sigma);
  });
}

// Makes the record of a layer whose sums are complete.
template <class Block>
BSSN_HD void finish_layer(Block& block, const ForwardCall& call, const ForwardLayer& layer, int index) {
  const double* const sums_of_tiles = call.sums + layer.sums;
  const double* const totals = block_sums<kSums>(block, [&](int thread, double* sums) {
    for (uint32_t x = thread; x < layer.tiles[reduce]; x += kThreads) {
      for (int j = 0; j < kSums; ++j) sums[j] += sums_of_tiles[x * kSums + j];
    }
  });
  make_record(block, call, layer, totals, block.template shared<Direction>(kLanesAt),
              [&](const Record& record, float sigma) {
                call.records[index] = record;
                call.sigmas[layer.position] = sigma;
              });
  block.publish(counter_of(call.counters, index, recorded));
}

// Squares of s and q, and their products with the stored vectors: of elements x, x + step, ... below `end`.
template <int Unroll>
BSSN_HD void add_firsts(const ForwardLayer& layer, uint32_t x, uint32_t end, uint32_t step, double* sums) {
  const uint32_t c_out = uint32_t(layer.c_out);
  BSSN_UNROLL_BY(Unroll)
  for (; x < end; x += step) {
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
}

// An element of t or r goes to the snapshot as part of a raw vector; t and r: the sums of their squares.
BSSN_HD void store_column(const ForwardLayer& layer, int x, float value, double& t, double& r) {
  const int row = layer.row();
  const double square = double(value) * value;
  if (x < row) {
    const int transposed = layer.kernel_major ? x % layer.c_in * layer.kernel + x / layer.c_in : x;
    layer.snapshot[1][transposed] = value;
    t += square;
  } else {
    layer.snapshot[2][x - row] = value;
    r += square;
  }
}

// Elements of t and r, summed over the power tiles in order, go to the snapshot as raw vectors; to `sums` their
// squares.
template <class Block, class Sums>
BSSN_HD void sum_columns(Block& block, const ForwardCall& call, const ForwardLayer& layer, uint32_t tile, Sums& sums) {
  const int row = layer.row(), size = row + (layer.two_sided() ? layer.c_in : 0);
  const int slices = layer.slices, quads = kThreads / slices, elements = 4 * quads, first = int(tile) * elements;
  const uint32_t shares = layer.tiles[power], share_size = layer.slot_size();
  const float* const slots = call.slot(layer, 0);
  float* const parts = block.template shared<float>(kLanesAt);  // [slices][elements]
  static_assert(kLanesAt + 4 * kThreads * sizeof(float) <= kResultsAt, "shared memory");
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
    BSSN_UNROLL_BY(1)
    for (int e = thread; e < elements && first + e < size; e += kThreads) {
      const int x = first + e;
      float sum = 0;
      for (int slice = 0; slice < slices; ++slice) sum += parts[slice * elements + e];
      store_column(layer, x, sum, sums[thread].x[4], sums[thread].x[5]);
    }
  });
}

template <class W, class Block>
BSSN_HD void reduce_tile(Block& block, const ForwardCall& call, const ForwardLayer& layer, int index, uint32_t tile) {
  block.wait(counter_of(call.counters, index, power_done), layer.chunks() > 1 ? 1u : layer.tiles[power]);
  const uint32_t first_tiles = layer.first_tiles();
  typename Block::template PerThread<ThreadSums> parts;
  block.all([&](int thread) { parts[thread] = ThreadSums{}; });
  if (tile < first_tiles) {
    const Span span = layer.firsts_of(tile);
    block.all([&](int thread) {
      double* const mine = parts[thread].x;
      add_firsts<kFirsts / kThreads>(layer, span.first + uint32_t(thread), span.end, kThreads, mine);
    });
  } else if (layer.stage_bytes == 0) {
    sum_split_columns<W>(block, layer, tile - first_tiles, parts);
  } else {
    sum_columns(block, call, layer, tile - first_tiles, parts);
  }
  const double* const sums = block_sums<kSums>(block, [&](int thread, double* mine) {
    BSSN_UNROLL
    for (int j = 0; j < kSums; ++j) mine[j] = parts[thread].x[j];
  });
  block.each([&](int thread) {
    if (thread < kSums) call.sums[layer.sums + tile * kSums + thread] = sums[thread];
  });
  const uint32_t before = block.arrive(counter_of(call.counters, index, reduce_done));
  if (before + 1 == layer.tiles[reduce]) finish_layer(block, call, layer, index);
}

}  // namespace bssn::cuda
