// The power iteration where rows do not fit into shared memory: very wide linear layers, a few rows of millions of
// elements, kernels of more positions than a block has threads. Any strides, any sizes.
//
// A power tile has some output channels and a chunk of the input channels, so that one long row keeps all
// multiprocessors busy. It leaves its share of s and q; the last of a layer's tiles adds the shares up in their order.
// A reduce tile then has some input channels of all rows and makes their t and r, for which it reads W once more.
#pragma once

#include "power.h"

namespace bssn::cuda {

// A thread's kernel position and first input channel, of which it takes every per_kernel-th.
struct SplitLane {
  int k, column, per_kernel;
  bool active;

  BSSN_HD SplitLane(const ForwardLayer& layer, int thread) {
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

// The part of s and q of one output channel that input channels [begin, end) make, to s[0] and q[kernel]. Kernels of
// more positions than a block has threads need several rounds of them, in which one thread sees all input channels, so
// that its q is complete. Unsigned, so that a step beyond the end of 2^31 elements is still one.
template <class W, class Block>
BSSN_HD void split_row(Block& block, const ForwardLayer& layer, int o, int begin, int end, float* s_out, float* q_out) {
  const LaneSums sums(block);
  const bool one_round = layer.kernel <= kThreads;
  block.each([&](int thread) {
    const SplitLane at(layer, thread);
    float s = 0, q = 0;
    const uint32_t kernel = uint32_t(layer.kernel);
    for (uint32_t k = at.active || !one_round ? uint32_t(at.k) : kernel; k < kernel; k += kThreads) {
      q = 0;
      BSSN_UNROLL_BY(4)
      for (uint32_t j = uint32_t(at.column); j < uint32_t(end - begin); j += uint32_t(at.per_kernel)) {
        const int i = begin + int(j);
        const float w = element<W>(layer, o, i, int(k));
        s += w * layer.vectors[1][uint32_t(i) * kernel + k];
        if (layer.two_sided()) q += w * layer.vectors[2][i];
      }
      if (layer.two_sided() && !one_round) q_out[k] = q;
    }
    sums.s_lanes[thread] = s;
    sums.q_lanes[thread] = q;
  });
  block.each([&](int thread) { sums.add_lanes(layer, Lane(layer, thread, 1), thread); });
  block.each([&](int thread) { sums.add_parts(layer, thread); });
  block.each([&](int thread) {
    const float* const total = sums.totals_of(layer, 0);
    if (thread == 0) *s_out = total[0];
    if (layer.two_sided() && one_round && thread < layer.kernel) q_out[thread] = total[1 + thread];
  });
}

// Adds up the chunks' shares of s and q.
template <class Block>
BSSN_HD void add_chunks(Block& block, const ForwardCall& call, const ForwardLayer& layer) {
  const float* const shares = call.slot(layer, 0);
  const uint32_t chunks = layer.chunks(), firsts = layer.firsts();
  block.each([&](int thread) {
    BSSN_UNROLL_BY(1)
    for (uint64_t x = uint64_t(thread); x < firsts; x += kThreads) {
      float sum = 0;
      BSSN_UNROLL_BY(4)
      for (uint32_t c = 0; c < chunks; ++c) sum += shares[c * uint64_t(firsts) + x];
      const uint64_t c_out = uint64_t(layer.c_out);
      (x < c_out ? layer.snapshot[0][x] : layer.snapshot[3][x - c_out]) = sum;
    }
  });
}

template <class W, class Block>
BSSN_HD void power_split(Block& block, const ForwardCall& call, const ForwardLayer& layer, int index, uint32_t tile) {
  const uint32_t chunks = layer.chunks(), rows = tile / chunks, chunk = tile - rows * chunks;
  const int begin = int(chunk) * layer.chunk, end = layer.c_in - begin < layer.chunk ? layer.c_in : begin + layer.chunk;
  float* const share = call.slot(layer, 0) + chunk * uint64_t(layer.firsts());
  float* const s = chunks == 1 ? layer.snapshot[0] : share;
  float* const q = chunks == 1 ? layer.snapshot[3] : share + layer.c_out;
  const int last = int(layer.end_channel(rows));
  for (int o = int(layer.first_channel(rows)); o < last; ++o) {
    split_row<W>(block, layer, o, begin, end, s + o, q + int64_t(o) * layer.kernel);
  }
  if (chunks > 1) {
    const uint32_t before = block.arrive(counter_of(call.counters, index, chunks_done));
    if (before + 1 < layer.tiles[power]) return;
    add_chunks(block, call, layer);
  }
  block.publish(counter_of(call.counters, index, power_done));
}

// t and r of a reduce tile's input channels, [elements] of the tile's part of a row, to the snapshot as raw vectors.
// `slices` threads share an element; their sums, and those of r's kernel positions, are added up in shared memory.
template <class W, class Block>
BSSN_HD void split_columns(Block& block, const ForwardLayer& layer, int begin, int channels) {
  const uint32_t kernel = uint32_t(layer.kernel), elements = uint32_t(channels) * kernel;
  const uint32_t slices = layer.slices, lanes = kThreads / slices, room = kSplitElements / slices;
  float* const t_lanes = block.template shared<float>(kAreaAt);  // [slices][room]
  float* const r_lanes = t_lanes + kSplitElements;
  for (uint32_t first = 0; first < elements; first += room) {  // several rounds only of a single channel
    const uint32_t end = first + lesser(elements - first, room);
    block.each([&](int thread) {
      const uint32_t lane = uint32_t(thread) % lanes, slice = uint32_t(thread) / lanes;
      if (slice >= slices) return;
      BSSN_UNROLL_BY(1)
      for (uint32_t x = first + lane; x < end; x += lanes) {
        const uint32_t i = layer.kernel_major ? x % uint32_t(channels) : x / kernel;
        const uint32_t k = layer.kernel_major ? x / uint32_t(channels) : x - i * kernel;
        float t = 0, r = 0;
        BSSN_UNROLL_BY(4)
        for (uint32_t o = slice; o < uint32_t(layer.c_out); o += slices) {
          const float w = element<W>(layer, int(o), begin + int(i), int(k));
          t += layer.snapshot[0][o] * w;
          if (layer.two_sided()) r += layer.snapshot[3][uint64_t(o) * kernel + k] * w;
        }
        const uint32_t at = slice * room + i * kernel + k - first;
        t_lanes[at] = t;
        r_lanes[at] = r;
      }
    });
    block.each([&](int thread) {
      BSSN_UNROLL_BY(1)
      for (uint32_t x = first + uint32_t(thread); x < end; x += kThreads) {
        float t = 0;
        for (uint32_t slice = 0; slice < slices; ++slice) t += t_lanes[slice * room + x - first];
        layer.snapshot[1][uint64_t(begin) * kernel + x] = t;
      }
      BSSN_UNROLL_BY(1)
      for (int i = layer.two_sided() ? thread : channels; i < channels; i += kThreads) {
        const uint32_t begins = uint32_t(i) * kernel, from = begins > first ? begins : first;
        const uint32_t to = lesser(begins + kernel, end);
        float r = first > 0 ? layer.snapshot[2][begin + i] : 0.0f;
        for (uint32_t slice = 0; slice < slices; ++slice) {
          BSSN_UNROLL_BY(4)
          for (uint32_t x = from; x < to; ++x) r += r_lanes[slice * room + x - first];
        }
        layer.snapshot[2][begin + i] = r;
      }
    });
  }
}

// The same, and to `sums` their squares.
template <class W, class Block, class Sums>
BSSN_HD void sum_split_columns(Block& block, const ForwardLayer& layer, uint32_t tile, Sums& sums) {
  const int begin = int(tile) * layer.column_channels, left = layer.c_in - begin;
  const int channels = left < layer.column_channels ? left : layer.column_channels;
  split_columns<W>(block, layer, begin, channels);
  block.all([&](int thread) {
    double *const t = sums[thread].x + 4, *const r = t + 1;
    const float* const t_all = layer.snapshot[1] + int64_t(begin) * layer.kernel;
    const uint32_t elements = uint32_t(channels) * uint32_t(layer.kernel);
    for (uint32_t x = uint32_t(thread); x < elements; x += kThreads) *t += double(t_all[x]) * t_all[x];
    if (!layer.two_sided()) return;
    const float* const r_all = layer.snapshot[2] + begin;
    for (int i = thread; i < channels; i += kThreads) *r += double(r_all[i]) * r_all[i];
  });
}

}  // namespace bssn::cuda
