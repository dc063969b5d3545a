// The power iteration's pass over W, one tile of output channels at a time:
//
//   s[o] = sum_ik W[o,i,k] v_out[i,k]     t[i,k] = sum_o W[o,i,k] s[o]      (raw u_out, v_out)
//   q[o,k] = sum_i W[o,i,k] u_in[i]       r[i] = sum_ok W[o,i,k] q[o,k]     (raw v_in, u_in)
//
// s and q of a channel need only its own row W[o]; the row is then still in shared memory when it adds to t and r. In
// evaluation only s and q are wanted.
//
// A group of threads shares a row: each thread has one kernel position k and every `per_kernel`-th input channel, so
// that its part of q is one number, and it keeps its elements of v_out, t and r in registers for the whole tile.
#pragma once

#include "reductions.h"

namespace bssn::cuda {

struct Lane {
  int group, lane, k, column, per_kernel;
  int count;   // of its elements of a row, of which the first and the distance to the next are:
  int offset;  // from the group's row
  int stride;
  bool active;

  Lane() = default;
  BSSN_HD Lane(const ForwardLayer& layer, int thread) {
    const int threads = layer.group_threads;
    group = thread / threads;
    lane = thread - group * threads;
    per_kernel = layer.kernel < threads ? threads / layer.kernel : 1;
    // Neighbouring threads take neighbouring elements of the row.
    k = layer.kernel_major ? lane / per_kernel : lane % layer.kernel;
    column = layer.kernel_major ? lane % per_kernel : lane / layer.kernel;
    active = k < layer.kernel && column < per_kernel;
    count = active && column < layer.c_in ? (layer.c_in - 1 - column) / per_kernel + 1 : 0;
    const int stride_in = layer.kernel_major ? 1 : layer.kernel, stride_kernel = layer.kernel_major ? layer.c_in : 1;
    offset = column * stride_in + k * stride_kernel;
    stride = per_kernel * stride_in;
  }
};

// Shared memory for s and q: one number of each thread, then a few for each channel, which whoever needs the sum adds.
struct LaneSums {
  float *s_lanes, *q_lanes, *s_parts, *q_parts;

  template <class Block>
  BSSN_HD explicit LaneSums(Block& block)
      : s_lanes(block.template shared<float>(kLanesAt)),
        q_lanes(s_lanes + kThreads),
        s_parts(block.template shared<float>(kPartsAt)),
        q_parts(s_parts + kMaxGroups * kSumParts) {}

  BSSN_HD static int q_count(const Lane& at) { return at.per_kernel < 8 ? at.per_kernel : 8; }

  BSSN_HD void combine_s(const ForwardLayer& layer, const Lane& at) const {
    const int threads = layer.group_threads, base = at.group * threads;
    const int from_end = threads - 1 - at.lane;
    if (from_end < kSumParts) {
      float sum = 0;
      for (int j = from_end; j < threads; j += kSumParts) sum += s_lanes[base + j];
      s_parts[at.group * kSumParts + from_end] = sum;
    }
  }

  BSSN_HD void combine(const ForwardLayer& layer, const Lane& at) const {
    combine_s(layer, at);
    const int base = at.group * layer.group_threads;
    const int count = q_count(at), k = at.lane % layer.kernel, part = at.lane / layer.kernel;
    if (layer.two_sided() && part < count) {
      const int stride_column = layer.kernel_major ? 1 : layer.kernel;
      const int stride_kernel = layer.kernel_major ? at.per_kernel : 1;
      float sum = 0;
      for (int c = part; c < at.per_kernel; c += count) sum += q_lanes[base + c * stride_column + k * stride_kernel];
      q_parts[base + k * count + part] = sum;
    }
  }

  BSSN_HD float s(const Lane& at) const {
    float sum = 0;
    BSSN_UNROLL
    for (int j = 0; j < kSumParts; ++j) sum += s_parts[at.group * kSumParts + j];
    return sum;
  }

  BSSN_HD float q(const ForwardLayer& layer, const Lane& at) const {
    const int count = q_count(at);
    float sum = 0;
    for (int j = 0; j < count; ++j) sum += q_parts[(at.group * layer.group_threads) + at.k * count + j];
    return sum;
  }
};

// Copies rows [first, end) of a weight whose rows follow each other in memory. The copy keeps the original's offset
// from a multiple of 16 bytes, whatever that is, so that all but its ends moves in pieces of 16 bytes.
template <class W>
BSSN_HD void stage_rows(const ForwardLayer& layer, int first, int end, unsigned char* stage, int thread) {
  constexpr int kPiece = 16 / int(sizeof(W));
  const W* const source = static_cast<const W*>(layer.weight) + int64_t(first) * layer.row();
  const int shift = int(reinterpret_cast<uintptr_t>(source) % 16 / sizeof(W));
  const int size = (end - first) * layer.row();
  W* const target = reinterpret_cast<W*>(stage);
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

template <class W>
BSSN_HD const W* staged_rows(const ForwardLayer& layer, int first, unsigned char* stage) {
  const W* const source = static_cast<const W*>(layer.weight) + int64_t(first) * layer.row();
  return reinterpret_cast<const W*>(stage) + reinterpret_cast<uintptr_t>(source) % 16 / sizeof(W);
}

// Calls f(n) for n < count. Every n is a constant once the loops are unrolled, so that arrays indexed
// with it lie in registers; the branch before every few keeps the compiler from loading for all of them at once.
template <class F>
BSSN_HD void for_columns(int count, F f) {
  constexpr int kBatch = 8;
  static_assert(kColumns % kBatch == 0, "whole batches");
  BSSN_UNROLL
  for (int first = 0; first < kColumns; first += kBatch) {
    if (first + kBatch <= count) {
      BSSN_UNROLL
      for (int n = first; n < first + kBatch; ++n) f(n);
    } else if (first < count) {
      BSSN_UNROLL
      for (int n = first; n < first + kBatch - 1; ++n) {
        if (n < count) f(n);
      }
    }
  }
}

struct PowerThread {
  Lane at;
  float v[kColumns], t[kColumns], r[kColumns];
};

// Adds the threads' t and r, over groups and for r over kernel positions, and writes the tile's share.
template <class Block, class Registers>
BSSN_HD void write_share(Block& block, const ForwardLayer& layer, Registers& registers, float* slot) {
  const int row = layer.row(), groups = layer.groups;
  const int stride_in = layer.kernel_major ? 1 : layer.kernel, stride_kernel = layer.kernel_major ? layer.c_in : 1;
  float* const table = block.template shared<float>(kAreaAt);  // [groups][row]
  block.each([&](int thread) {
    const PowerThread& my = registers[thread];
    float* const mine = table + my.at.group * row + my.at.offset;
    for_columns(my.at.count, [&](int n) { mine[n * my.at.stride] = my.t[n]; });
  });
  block.each([&](int thread) {
    for (int p = thread; p < row; p += kThreads) {
      float sum = 0;
      for (int g = 0; g < groups; ++g) sum += table[g * row + p];
      slot[p] = sum;
    }
  });
  if (!layer.two_sided()) return;
  block.each([&](int thread) {
    const PowerThread& my = registers[thread];
    float* const mine = table + my.at.group * row + my.at.offset;
    for_columns(my.at.count, [&](int n) { mine[n * my.at.stride] = my.r[n]; });
  });
  block.each([&](int thread) {
    for (int i = thread; i < layer.c_in; i += kThreads) {
      float sum = 0;
      for (int g = 0; g < groups; ++g) {
        int k = i % layer.kernel;  // threads begin at different positions, or they would meet in one bank
        for (int j = 0; j < layer.kernel; ++j) {
          sum += table[g * row + i * stride_in + k * stride_kernel];
          k = k + 1 == layer.kernel ? 0 : k + 1;
        }
      }
      slot[row + i] = sum;
    }
  });
}

// For rows that fit into shared memory: W is read once.
template <class W, class Block>
BSSN_HD void power_staged(Block& block, const ForwardCall& call, const ForwardLayer& layer, int first, int end,
                          float* slot) {
  const int groups = layer.groups, row = layer.row(), ahead = layer.stages - 1;
  const int steps = (end - first + groups - 1) / groups;
  const LaneSums sums(block);
  float* const u_in = block.template shared<float>(kAreaAt);
  unsigned char* const stages = block.template shared<unsigned char>(
      kAreaAt + (layer.two_sided() ? (uint32_t(layer.c_in) * 4u + 15u) & ~15u : 0u));
  const auto begin_of = [&](int step) { return first + step * groups; };
  const auto end_of = [&](int step) { return begin_of(step) + groups < end ? begin_of(step) + groups : end; };
  const auto begin_copy = [&](int step, int stage, int thread) {
    unsigned char* const target = stages + uint32_t(stage) * layer.stage_bytes;
    if (step < steps) stage_rows<W>(layer, begin_of(step), end_of(step), target, thread);
    block.commit_copies();
  };

  typename Block::template PerThread<PowerThread> registers;
  block.each([&](int thread) {
    for (int step = 0; step < ahead; ++step) begin_copy(step, step, thread);
    PowerThread& my = registers[thread];
    my.at = Lane(layer, thread);
    const float* const v_out = layer.vectors[1] + my.at.column * layer.kernel + my.at.k;
    const int stride = my.at.per_kernel * layer.kernel;
    BSSN_UNROLL
    for (int n = 0; n < kColumns; ++n) {
      my.v[n] = n < my.at.count ? v_out[n * stride] : 0.0f;
      my.t[n] = my.r[n] = 0.0f;
    }
    if (layer.two_sided()) {
      for (int i = thread; i < layer.c_in; i += kThreads) u_in[i] = layer.vectors[2][i];
    }
  });

  for (int step = 0, stage = 0; step < steps; ++step, stage = stage == ahead ? 0 : stage + 1) {
    const W* const rows = staged_rows<W>(layer, begin_of(step), stages + uint32_t(stage) * layer.stage_bytes);
    const int active_groups = end_of(step) - begin_of(step);
    block.each([&](int thread) {
      begin_copy(step + ahead, stage == 0 ? ahead : stage - 1, thread);
      block.wait_for_copies(ahead);
    });
    block.each([&](int thread) {
      const PowerThread& my = registers[thread];
      const W* const mine = rows + my.at.group * row + my.at.offset;
      const int count = my.at.group < active_groups ? my.at.count : 0;
      const int stride = not_before_here(my.at.stride);
      float s = 0, q = 0;
      if (layer.two_sided()) {
        const float* const u = u_in + my.at.column;
        const int u_stride = not_before_here(my.at.per_kernel);
        for_columns(count, [&](int n) {
          const float w = to_float(mine[n * stride]);
          s += w * my.v[n];
          q += w * u[n * u_stride];
        });
      } else {
        for_columns(count, [&](int n) { s += to_float(mine[n * stride]) * my.v[n]; });
      }
      sums.s_lanes[thread] = s;
      sums.q_lanes[thread] = q;
    });
    block.each([&](int thread) { sums.combine(layer, registers[thread].at); });
    block.each([&](int thread) {
      PowerThread& my = registers[thread];
      if (my.at.count == 0 || my.at.group >= active_groups) return;
      const int o = begin_of(step) + my.at.group;
      const float s = sums.s(my.at), q = layer.two_sided() ? sums.q(layer, my.at) : 0.0f;
      if (my.at.lane == 0) layer.snapshot[0][o] = s;
      if (layer.two_sided() && my.at.column == 0) layer.snapshot[3][int64_t(o) * layer.kernel + my.at.k] = q;
      if (!call.update) return;
      const W* const mine = rows + my.at.group * row + my.at.offset;
      const int stride = not_before_here(my.at.stride);
      for_columns(my.at.count, [&](int n) {
        const float w = to_float(mine[n * stride]);
        my.t[n] += s * w;
        my.r[n] += q * w;
      });
    });
  }
  if (call.update) write_share(block, layer, registers, slot);
}

}  // namespace bssn::cuda
