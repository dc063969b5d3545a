// The power iteration's pass over W where rows do not fit into shared memory or do not lie in one piece (transposed
// convolutions, very wide linear layers). A tile's rows are read from global memory twice, the second time mostly from
// the cache. Any strides, any sizes.
#pragma once

#include "power.h"

namespace bssn::cuda {

// A thread's kernel position and first input channel, of which it takes every per_kernel-th.
struct WideLane {
  int k, column, per_kernel;
  bool active;

  BSSN_HD WideLane(const ForwardLayer& layer, int thread) {
    per_kernel = layer.kernel < kThreads ? kThreads / layer.kernel : 1;
    // Neighbouring threads take neighbouring elements of the row.
    k = layer.kernel_major ? thread / per_kernel : thread % layer.kernel;
    column = layer.kernel_major ? thread % per_kernel : thread / layer.kernel;
    active = k < layer.kernel && column < per_kernel;
  }
};

template <class W>
BSSN_HD float element(const ForwardLayer& layer, int o, int i, int k) {
  // A weight has less than 2^31 elements, so the sum is exact in 32 bits.
  const int at = o * layer.stride_out + i * layer.stride_in + k * layer.stride_kernel;
  return to_float(static_cast<const W*>(layer.weight)[at]);
}

// s and q of one output channel. Kernels of more positions than a block has threads need several rounds of them, in
// which one thread sees all input channels, so that its q is complete.
template <class W, class Block>
BSSN_HD void wide_row(Block& block, const ForwardLayer& layer, int o) {
  const LaneSums sums(block);
  const bool one_round = layer.kernel <= kThreads;
  block.each([&](int thread) {
    const WideLane at(layer, thread);
    float s = 0, q = 0;
    for (int k = at.active || !one_round ? at.k : layer.kernel; k < layer.kernel; k += kThreads) {
      q = 0;
      BSSN_UNROLL_BY(4)
      for (int i = at.column; i < layer.c_in; i += at.per_kernel) {
        const float w = element<W>(layer, o, i, k);
        s += w * layer.vectors[1][i * layer.kernel + k];
        if (layer.two_sided()) q += w * layer.vectors[2][i];
      }
      if (layer.two_sided() && !one_round) layer.snapshot[3][int64_t(o) * layer.kernel + k] = q;
    }
    sums.s_lanes[thread] = s;
    sums.q_lanes[thread] = q;
  });
  block.each([&](int thread) { sums.add_lanes(layer, Lane(layer, thread, 1), thread); });
  block.each([&](int thread) { sums.add_parts(layer, thread); });
  block.each([&](int thread) {
    const float* const total = sums.totals_of(layer, 0);
    if (thread == 0) layer.snapshot[0][o] = total[0];
    if (layer.two_sided() && one_round && thread < layer.kernel) {
      layer.snapshot[3][int64_t(o) * layer.kernel + thread] = total[1 + thread];
    }
  });
}

template <class W, class Block>
BSSN_HD void power_wide(Block& block, const ForwardCall& call, const ForwardLayer& layer, uint32_t tile) {
  const int first = layer.first_channel(tile), end = layer.end_channel(tile);
  for (int o = first; o < end; ++o) wide_row<W>(block, layer, o);
  if (!call.update) return;

  float* const slot = call.slot(layer, tile);
  float* const q_lanes = LaneSums(block).q_lanes;
  const bool one_round = layer.kernel <= kThreads;
  const int per_kernel = WideLane(layer, 0).per_kernel, kernel_lanes = one_round ? layer.kernel : kThreads;
  for (int i0 = 0; i0 < layer.c_in; i0 += per_kernel) {
    block.each([&](int thread) {
      const WideLane at(layer, thread);
      const int i = i0 + at.column;
      float r = 0;
      if ((at.active || !one_round) && i < layer.c_in) {
        for (int k = at.k; k < layer.kernel; k += kThreads) {
          float t = 0;
          BSSN_UNROLL_BY(4)
          for (int o = first; o < end; ++o) {
            const float w = element<W>(layer, o, i, k);
            t += layer.snapshot[0][o] * w;
            if (layer.two_sided()) r += layer.snapshot[3][int64_t(o) * layer.kernel + k] * w;
          }
          slot[layer.kernel_major ? k * layer.c_in + i : i * layer.kernel + k] = t;
        }
      }
      q_lanes[thread] = r;
    });
    if (!layer.two_sided()) continue;
    block.each([&](int thread) {
      if (thread >= per_kernel || i0 + thread >= layer.c_in) return;
      float sum = 0;
      for (int k = 0; k < kernel_lanes; ++k) {
        sum += q_lanes[layer.kernel_major ? k * per_kernel + thread : thread * layer.kernel + k];
      }
      slot[layer.row() + i0 + thread] = sum;
    });
  }
}

// One power tile: s and q of its channels, and its share of t and r.
template <class W, class Block>
BSSN_HD void power_tile(Block& block, const ForwardCall& call, const ForwardLayer& layer, int index, uint32_t tile) {
  if (layer.stage_bytes && layer.packed) {
    power_staged<W, kMaxPack>(block, call, layer, tile);
  } else if (layer.stage_bytes) {
    power_staged<W, 1>(block, call, layer, tile);
  } else {
    power_wide<W>(block, call, layer, tile);
  }
  block.publish(counter_of(call.counters, index, power_done));
}

}  // namespace bssn::cuda
