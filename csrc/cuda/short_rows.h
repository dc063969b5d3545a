// The power iteration's pass over rows of a few dozen elements, as first layers and depthwise convolutions have them:
// a thread has a row, and then a column of some rows. power.h has the formulas. Any layout, any alignment.
#pragma once

#include "staging.h"

namespace bssn::cuda {

constexpr int kMostShort = 192;  // elements of a row

// Threads read neighbouring rows, which lie `row` elements apart: how long that takes for the shared memory's banks.
BSSN_HD bool is_short(int64_t row) {
  const int64_t same_bank = row & -row;  // the largest power of two that divides it
  return row <= kMostShort && row * lesser(uint32_t(same_bank), 32u) <= 1536;
}

// Threads that share a row, of a tile of so many.
BSSN_HD int short_lanes(int rows) { return int(lesser(uint32_t(kThreads / rows), 4u)); }

// Shared memory of a tile of so many rows, or fewer, after its rows and its vectors: q of all rows, each lane's part of
// s, then t and r of the threads.
BSSN_HD int64_t short_scratch(int64_t rows, int64_t kernel) {
  return (rows * kernel + 3 * kThreads) * int64_t(sizeof(float));
}

// A lane's part of s, and q of every `lanes`-th kernel position, of a row.
template <class W>
BSSN_HD float short_row(const ForwardLayer& layer, const W* row, const float* v, const float* u, float* q, int lane,
                        int lanes) {
  const int kernel = layer.kernel, step_i = layer.kernel_major ? 1 : kernel,
            step_k = layer.kernel_major ? layer.c_in : 1;
  float s = 0;
  BSSN_UNROLL_BY(1)
  for (int k = lane; k < kernel; k += lanes) {
    float q_sum = 0;
    BSSN_UNROLL_BY(3)
    for (int i = 0; i < layer.c_in; ++i) {
      const float w = to_float(row[i * step_i + k * step_k]);
      s += w * v[i * kernel + k];
      q_sum += w * u[i];
    }
    q[k] = q_sum;
  }
  return s;
}

template <class W, class Block>
BSSN_HD void power_short(Block& block, const ForwardCall& call, const ForwardLayer& layer, uint32_t tile, float* slot) {
  const uint32_t first = layer.first_channel(tile);
  const int rows = int(layer.end_channel(tile) - first), row = layer.row(), kernel = layer.kernel, c_in = layer.c_in;
  const int lanes = short_lanes(rows);
  unsigned char* const stage = block.template shared<unsigned char>(kAreaAt);
  float* const v = block.template shared<float>(kAreaAt + 16u * layer.vectors_at);
  float *const u = v + row, *const q = u + c_in, *const s = q + rows * kernel;
  float *const t_parts = s + kThreads, *const r_parts = t_parts + kThreads;
  const W* const staged = staged_rows<W>(layer, first, stage);
  const bool two_sided = layer.two_sided();
  block.each([&](int thread) {
    begin_rows<W, 1>(layer, first, rows, stage, thread);
    block.commit_copies();
    for (int x = thread; x < row; x += kThreads) v[x] = layer.vectors[1][x];
    for (int i = thread; i < c_in; i += kThreads) u[i] = two_sided ? layer.vectors[2][i] : 0.0f;
    block.wait_for_copies(0);
  });
  block.each([&](int thread) {
    const int lane = thread / rows, o = thread - lane * rows;
    if (lane < lanes) s[thread] = short_row(layer, staged + o * row, v, u, q + o * kernel, lane, lanes);
  });
  block.each([&](int thread) {
    if (thread < rows) {
      float sum = s[thread];
      for (int lane = 1; lane < lanes; ++lane) sum += s[lane * rows + thread];
      layer.snapshot[0][first + uint32_t(thread)] = s[thread] = sum;
    }
    for (int x = two_sided ? thread : rows * kernel; x < rows * kernel; x += kThreads) {
      layer.snapshot[3][int64_t(first) * kernel + x] = q[x];
    }
  });
  if (!call.update) return;
  const int slices = kThreads / row;  // threads that share a column
  block.each([&](int thread) {
    const int slice = thread / row, x = thread - slice * row;
    if (slice >= slices) return;
    const int k = layer.kernel_major ? x / c_in : x % kernel;
    float t = 0, r = 0;
    BSSN_UNROLL_BY(4)
    for (int o = slice; o < rows; o += slices) {
      const float w = to_float(staged[o * row + x]);
      t += s[o] * w;
      r += q[o * kernel + k] * w;
    }
    t_parts[thread] = t;
    r_parts[thread] = r;
  });
  block.each([&](int thread) {
    if (thread >= row) return;
    float t = 0, r = 0;
    BSSN_UNROLL_BY(2)
    for (int x = thread; x < slices * row; x += row) {
      t += t_parts[x];
      r += r_parts[x];
    }
    slot[thread] = t;
    r_parts[thread] = r;  // only this thread has read it
  });
  block.each([&](int thread) {
    if (thread >= c_in || !two_sided) return;
    const int step_i = layer.kernel_major ? 1 : kernel, step_k = layer.kernel_major ? c_in : 1;
    float sum = 0;
    BSSN_UNROLL_BY(4)
    for (int k = 0; k < kernel; ++k) sum += r_parts[thread * step_i + k * step_k];
    slot[row + thread] = sum;
  });
}

}  // namespace bssn::cuda
