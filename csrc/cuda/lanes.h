// How a group of threads shares a row of a weight, and how it adds up s and q of that row.
#pragma once

#include "reductions.h"

namespace bssn::cuda {

// How a group of `threads` walks through a row in packs of V elements. Each thread then has V numbers for q, or one
// where all its elements have the same kernel position (kernel_major).
struct Walk {
  int stride;         // elements from a thread's pack to its next
  int of_kernel;      // kernel_major: threads that share a kernel position
  int lane_stride_k;  // in the group's numbers for q, from one kernel position to the next
  int lane_stride;    // and between those of the same position
  int same_k;         // of which there are so many

  BSSN_HD Walk(int threads, int kernel, bool kernel_major, int V) {
    if (kernel_major) {
      of_kernel = threads / kernel;
      stride = of_kernel * V;
      lane_stride_k = same_k = of_kernel;
      lane_stride = 1;
    } else {
      const int period = V == 1 || kernel % 4 == 0 ? kernel : kernel % 2 == 0 ? 2 * kernel : 4 * kernel;
      of_kernel = 0;
      stride = threads * V / period * period;
      lane_stride_k = 1;
      lane_stride = kernel;
      same_k = stride / kernel;
    }
  }
};

// A thread's packs of a row, layer.stride elements apart, and which numbers it adds up for q. Found once for a tile, as
// divisions take long, and packed into few registers.
struct Lane {
  static constexpr int kMaxTerms = 127;

  int offset;       // of the first pack, in elements
  uint32_t packed;  // four numbers

  // How many packs, of a row that is staged.
  BSSN_HD int count() const { return int(packed & 63u); }
  // The kernel position of all elements (kernel_major), or of the first.
  BSSN_HD int position() const { return int(packed >> 6 & 255u); }
  // For q: the first number, and how many there are.
  BSSN_HD int q_first() const { return int(packed >> 14 & 2047u); }
  BSSN_HD int q_terms() const { return int(packed >> 25); }
  // Where the first element's u_in lies in shared memory.
  BSSN_HD int u_offset(const ForwardLayer& layer) const {
    return layer.kernel_major ? offset - position() * layer.c_in : offset;
  }

  Lane() = default;
  BSSN_HD Lane(const ForwardLayer& layer, int thread, int V) {
    const int threads = layer.group_threads(), row = layer.row(), kernel = layer.kernel;
    const int lane = thread & (threads - 1);
    const Walk walk(threads, kernel, layer.kernel_major, V);
    int position = 0, packs = 0;
    offset = 0;
    if (!layer.kernel_major) {
      offset = lane * V;
      position = offset % kernel;
      if (offset < walk.stride && offset < row) packs = (row - 1 - offset) / walk.stride + 1;
    } else if (lane < walk.of_kernel * kernel) {
      position = lane / walk.of_kernel;
      const int channel = (lane - position * walk.of_kernel) * V;
      offset = position * layer.c_in + channel;
      if (channel < layer.c_in) packs = (layer.c_in - 1 - channel) / walk.stride + 1;
    }
    const int part = lane / kernel, k = lane - part * kernel, parts = layer.q_parts;
    const int terms = part < parts && part < walk.same_k ? (walk.same_k - 1 - part) / parts + 1 : 0;
    const int first = terms > 0 ? (thread - lane) * V + k * walk.lane_stride_k + part * walk.lane_stride : 0;
    static_assert(kManyColumns < 64 && kThreads <= 256 && kMaxPack * kThreads <= 2048, "what the fields can hold");
    packs = packs < 63 ? packs : 63;  // rows that are not staged may have any number
    packed = uint32_t(packs) | uint32_t(position) << 6 | uint32_t(first) << 14 | uint32_t(terms) << 25;
  }
};

// Shared memory for s and q of a step's rows: the numbers of each thread, then some sums of them, then s and q.
struct LaneSums {
  float *s_lanes, *q_lanes, *s_parts, *q_parts, *totals;

  template <class Block>
  BSSN_HD explicit LaneSums(Block& block)
      : s_lanes(block.template shared<float>(kLanesAt)),
        q_lanes(s_lanes + kThreads),
        s_parts(block.template shared<float>(kPartsAt)),
        q_parts(s_parts + kThreads / kSumParts),
        totals(block.template shared<float>(kTotalsAt)) {}

  // Adds up in parts.
  BSSN_HD void add_lanes(const ForwardLayer& layer, const Lane& at, int thread) const {
    if (thread % kSumParts == 0) {
      float sum = 0;
      BSSN_UNROLL
      for (int j = 0; j < kSumParts; ++j) sum += s_lanes[thread + j];
      s_parts[thread / kSumParts] = sum;
    }
    const int terms = layer.two_sided() ? at.q_terms() : 0;
    if (terms == 0) return;
    const int step = layer.q_parts * (layer.kernel_major ? 1 : layer.kernel);
    const float* lanes = q_lanes + at.q_first();
    float sum = 0;
    BSSN_UNROLL_BY(8)
    for (int m = 0; m < terms; ++m, lanes += step) sum += *lanes;
    q_parts[thread] = sum;
  }

  // Adds up the parts.
  BSSN_HD void add_parts(const ForwardLayer& layer, int thread) const {
    const int threads = layer.group_threads(), lane = thread & (threads - 1);
    float* const total = totals_of(layer, thread);
    if (lane == threads - 1) {
      const float* const parts = s_parts + (thread - lane) / kSumParts;
      float sum = 0;
      BSSN_UNROLL_BY(4)
      for (int j = 0; j < threads / kSumParts; ++j) sum += parts[j];
      total[0] = sum;
    }
    if (!layer.two_sided() || lane >= layer.kernel) return;
    const float* parts = q_parts + thread;
    float sum = 0;
    BSSN_UNROLL_BY(8)
    for (int j = 0; j < layer.q_parts; ++j, parts += layer.kernel) sum += *parts;
    total[1 + lane] = sum;
  }

  // s, then q of all kernel positions, of a thread's group.
  BSSN_HD float* totals_of(const ForwardLayer& layer, int thread) const {
    return totals + (thread & -layer.group_threads()) + (thread >> layer.group_shift);
  }
};

}  // namespace bssn::cuda
