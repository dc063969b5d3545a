// The power iteration's pass over W, one tile of output channels at a time:
//
//   s[o] = sum_ik W[o,i,k] v_out[i,k]     t[i,k] = sum_o W[o,i,k] s[o]      (raw u_out, v_out)
//   q[o,k] = sum_i W[o,i,k] u_in[i]       r[i] = sum_ok W[o,i,k] q[o,k]     (raw v_in, u_in)
//
// s and q of a channel need only its own row W[o]; the row is then still in shared memory when it adds to t and r. In
// evaluation only s and q are wanted.
//
// A group of threads shares a row, V neighbouring elements of it at a time: V = 4 where rows begin at multiples of 16
// bytes, else 1. From one of its packs to the next a thread goes on by a multiple of the kernel's size, or along the
// input channels of one kernel position where these lie innermost; so its kernel positions, and with them the numbers
// that its part of q consists of, stay the same. It keeps its elements of v_out, t and r in registers for a whole tile.
#pragma once

#include "lanes.h"
#include "staging.h"

namespace bssn::cuda {

// Calls f(n) for n < count. Every n is a constant once the loop is unrolled, so that arrays indexed with it lie in
// registers.
template <int V, class F>
BSSN_HD void for_packs(int count, F f) {
  static_assert(kColumns<V> % V == 0, "whole packs");
  BSSN_UNROLL
  for (int n = 0; n < kColumns<V> / V; ++n) {
    if (n < count) f(n);
  }
}

template <int V>
struct PowerThread {
  Lane at;
  float v[kVColumns<V>], t[kColumns<V>], r[kColumns<V>];
};

// Adds the threads' t and r, over groups and for r over kernel positions, and writes the tile's share.
template <int V, class Block, class Registers>
BSSN_HD void write_share(Block& block, const ForwardLayer& layer, Registers& registers, float* slot) {
  const int row = layer.row(), groups = layer.groups;
  float* const table = block.template shared<float>(kAreaAt);  // [groups][row]
  block.each([&](int thread) {
    const PowerThread<V>& my = registers[thread];
    float* const mine = table + (thread >> layer.group_shift) * row + my.at.offset;
    for_packs<V>(my.at.count(), [&](int n) { store_pack<V>(my.t + n * V, mine + n * layer.stride); });
  });
  block.each([&](int thread) {
    BSSN_UNROLL_BY(1)
    for (int p = thread; p < row; p += kThreads) {
      float sum = 0;
      BSSN_UNROLL_BY(4)
      for (int g = 0; g < groups; ++g) sum += table[g * row + p];
      slot[p] = sum;
    }
  });
  if (!layer.two_sided()) return;
  block.each([&](int thread) {
    const PowerThread<V>& my = registers[thread];
    float* const mine = table + (thread >> layer.group_shift) * row + my.at.offset;
    for_packs<V>(my.at.count(), [&](int n) { store_pack<V>(my.r + n * V, mine + n * layer.stride); });
  });
  // First over kernel positions; the sums take the places of position 0.
  const int stride_in = layer.kernel_major ? 1 : layer.kernel, stride_kernel = layer.kernel_major ? layer.c_in : 1;
  block.each([&](int thread) {
    BSSN_UNROLL_BY(1)
    for (int x = thread; x < groups * layer.c_in; x += kThreads) {
      const int g = x / layer.c_in, i = x - g * layer.c_in;
      float* const mine = table + g * row + i * stride_in;
      float sum = 0;
      BSSN_UNROLL_BY(4)
      for (int k = 0; k < layer.kernel; ++k) sum += mine[k * stride_kernel];
      mine[0] = sum;
    }
  });
  block.each([&](int thread) {
    BSSN_UNROLL_BY(1)
    for (int i = thread; i < layer.c_in; i += kThreads) {
      float sum = 0;
      BSSN_UNROLL_BY(4)
      for (int g = 0; g < groups; ++g) sum += table[g * row + i * stride_in];
      slot[row + i] = sum;
    }
  });
}

// For rows that fit into shared memory: W is read once. A step is one row for each group; its copy into shared memory
// begins while earlier steps are worked on.
template <class W, int V, class Block>
BSSN_HD void power_staged(Block& block, const ForwardCall& call, const ForwardLayer& layer, uint32_t tile,
                          float* slot) {
  const int groups = layer.groups, row = layer.row(), kernel = layer.kernel, ahead = layer.stages - 1;
  const uint32_t end = layer.end_channel(tile), first = layer.first_channel(tile);
  const LaneSums sums(block);
  float* const u_in = block.template shared<float>(kAreaAt);  // for each element of a row, or each input channel
  float* const more_v = block.template shared<float>(kAreaAt + layer.u_bytes());  // packs of all threads
  unsigned char* const stages = block.template shared<unsigned char>(kAreaAt + layer.u_bytes() + layer.v_bytes());
  const auto begin_copy = [&](uint32_t begin, int stage, int thread) {
    if (begin < end) {
      const int rows = int(lesser(end - begin, uint32_t(groups)));
      begin_rows<W, V>(layer, begin, rows, stages + uint32_t(stage) * layer.stage_bytes, thread);
    }
    block.commit_copies();
  };

  typename Block::template PerThread<PowerThread<V>> registers;
  block.each([&](int thread) {
    BSSN_UNROLL_BY(1)
    for (int stage = 0; stage == 0 || stage < ahead; ++stage) begin_copy(first + stage * groups, stage, thread);
    PowerThread<V>& my = registers[thread];
    my = PowerThread<V>{};  // see power_rows
    my.at = Lane(layer, thread, V);
    // v_out is in the order [i][k], whatever that of the weight.
    const int between = layer.kernel_major ? kernel : 1, step = layer.stride * between;
    const float* v_out =
        layer.vectors[1] + (layer.kernel_major ? my.at.u_offset(layer) * kernel + my.at.position() : my.at.offset);
    BSSN_UNROLL
    for (int n = 0; n < kColumns<V> / V; ++n, v_out += not_before_here(step)) {
      BSSN_UNROLL
      for (int j = 0; j < V; ++j) {
        const float v = n < my.at.count() ? v_out[j * between] : 0.0f;
        if (n * V < kVColumns<V>) {
          my.v[n * V + j] = v;
        } else if (layer.more_v) {
          more_v[((n - kVColumns<V> / V) * kThreads + thread) * V + j] = v;
        }
        my.t[n * V + j] = my.r[n * V + j] = 0.0f;
      }
    }
    const int u_size = int(layer.u_bytes() / sizeof(float));
    BSSN_UNROLL_BY(4)
    for (int x = thread; x < u_size; x += kThreads) {
      const int i = layer.kernel_major ? x : x / kernel;
      u_in[x] = i < layer.c_in ? layer.vectors[2][i] : 0.0f;
    }
    block.wait_for_copies(ahead > 1 ? ahead - 1 : 0);
  });

  int stage = 0;
  for (uint32_t begin = first; begin < end; begin += groups) {
    const W* const staged = staged_rows<W>(layer, begin, stages + uint32_t(stage) * layer.stage_bytes);
    block.each([&](int thread) {
      if (ahead > 0) begin_copy(begin + ahead * groups, stage == 0 ? ahead : stage - 1, thread);
      const PowerThread<V>& my = registers[thread];
      const int stride = layer.stride, group = thread >> layer.group_shift;
      const W* const mine = staged + group * row + my.at.offset;
      const int count = begin + group < end ? my.at.count() : 0;
      float s = 0, q[V] = {};
      const auto add_product = [&](int n, const float* w) {
        const float* v = my.v + n * V;
        float loaded[V];
        if (n * V >= kVColumns<V>) {
          load_pack<V>(more_v + ((n - kVColumns<V> / V) * kThreads + thread) * V, loaded);
          v = loaded;
        }
        BSSN_UNROLL
        for (int j = 0; j < V; ++j) s += w[j] * v[j];
      };
      if (layer.two_sided()) {
        const float* const u = u_in + my.at.u_offset(layer);
        for_packs<V>(count, [&](int n) {
          float w[V], u_n[V];
          load_pack<V>(mine + n * stride, w);
          load_pack<V>(u + n * stride, u_n);
          add_product(n, w);
          BSSN_UNROLL
          for (int j = 0; j < V; ++j) q[j] += w[j] * u_n[j];
        });
        if (layer.kernel_major) {
          BSSN_UNROLL
          for (int j = 1; j < V; ++j) q[0] += q[j];
          sums.q_lanes[thread + (group << layer.group_shift) * (V - 1)] = q[0];
        } else {
          store_pack<V>(q, sums.q_lanes + thread * V);
        }
      } else {
        for_packs<V>(count, [&](int n) {
          float w[V];
          load_pack<V>(mine + n * stride, w);
          add_product(n, w);
        });
      }
      sums.s_lanes[thread] = s;
    });
    block.each([&](int thread) { sums.add_lanes(layer, registers[thread].at, thread); });
    block.each([&](int thread) { sums.add_parts(layer, thread); });
    block.each([&](int thread) {
      PowerThread<V>& my = registers[thread];
      const int group = thread >> layer.group_shift, lane = thread & (layer.group_threads() - 1);
      const uint32_t o = begin + group;
      if (o < end) {
        const float* const total = sums.totals_of(layer, thread);
        const float s = total[0];
        float q[V] = {};
        if (lane == 0) layer.snapshot[0][o] = s;
        if (layer.two_sided()) {
          if (lane < kernel) layer.snapshot[3][int64_t(o) * kernel + lane] = total[1 + lane];
          int k = my.at.position();
          BSSN_UNROLL
          for (int j = 0; j < V; ++j) {
            q[j] = my.at.count() > 0 ? total[1 + k] : 0.0f;
            if (!layer.kernel_major) k = k + 1 == kernel ? 0 : k + 1;
          }
        }
        const int stride = layer.stride, count = call.update ? my.at.count() : 0;
        const W* const mine = staged + group * row + my.at.offset;
        for_packs<V>(count, [&](int n) {
          float w[V];
          load_pack<V>(mine + n * stride, w);
          BSSN_UNROLL
          for (int j = 0; j < V; ++j) {
            my.t[n * V + j] += s * w[j];
            my.r[n * V + j] += q[j] * w[j];
          }
        });
      }
      if (ahead > 0) block.wait_for_copies(ahead - 1);  // the next step's have arrived
    });
    if (ahead == 0 && begin + groups < end) {
      block.each([&](int thread) {
        begin_copy(begin + groups, 0, thread);
        block.wait_for_copies(0);
      });
    }
    stage = stage == ahead ? 0 : stage + 1;
  }
  if (call.update) write_share<V>(block, layer, registers, slot);
}

}  // namespace bssn::cuda
