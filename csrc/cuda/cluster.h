// A whole layer in one cluster: its blocks share the layer's rows and meet at the cluster's barrier. They read each
// other's shares of t and r, and sums of squares, in shared memory: no tickets, no counters, nothing of the workspace.
#pragma once

#include "reduce.h"

namespace bssn::cuda {

// In shared memory: the layer's sums, then its record, then what it is made of.
constexpr uint32_t kRecordAt = kLanesAt + (kSums + 1) / 2 * 2 * sizeof(double);
static_assert(kRecordAt + sizeof(Record) + 2 * sizeof(Direction) <= kResultsAt, "shared memory");

// The block's part of the sums over s, q, t and r, once all blocks have made their shares. It makes t and r of its
// part.
template <class Block>
BSSN_HD void sum_cluster_part(Block& block, const ForwardCall& call, const ForwardLayer& layer) {
  const uint32_t begin = uint32_t(block.rank()) * kThreads, step = kCluster * kThreads;
  const uint32_t size = uint32_t(layer.row()) + (layer.two_sided() ? uint32_t(layer.c_in) : 0u);
  block_sums<kSums>(block, [&](int thread, double* sums) {
    add_firsts<1>(layer, begin + uint32_t(thread), layer.firsts(), step, sums);
    if (!call.update) return;
    BSSN_UNROLL_BY(1)
    for (uint32_t x = begin + uint32_t(thread); x < size; x += step) {
      float sum = 0;
      BSSN_UNROLL_BY(kCluster)
      for (uint32_t share = 0; share < layer.tiles[power]; ++share) {
        sum += block.template remote<float>(16u * layer.slots, int(share))[x];
      }
      store_column(layer, int(x), sum, sums[4], sums[5]);
    }
  });
}

// The layer's record, in shared memory, after the block's power tile. To be followed by block.wait_for_cluster().
template <class Block>
BSSN_HD const Record& cluster_record(Block& block, const ForwardCall& call, const ForwardLayer& layer) {
  block.arrive_in_cluster();
  block.wait_for_cluster();
  sum_cluster_part(block, call, layer);
  block.arrive_in_cluster();
  block.wait_for_cluster();
  double* const totals = block.template shared<double>(kLanesAt);
  Record* const record = block.template shared<Record>(kRecordAt);
  Direction* const sides = block.template shared<Direction>(kRecordAt + sizeof(Record));
  block.each([&](int thread) {
    if (thread >= kSums) return;
    double sum = 0;
    BSSN_UNROLL
    for (int rank = 0; rank < kCluster; ++rank) sum += block.template remote<double>(kSumsAt, rank)[thread];
    totals[thread] = sum;
  });
  block.arrive_in_cluster();  // before others' sums, and shares, may be overwritten
  make_record(block, call, layer, totals, sides, [&](const Record& made, float sigma) {
    *record = made;
    if (block.rank() == 0) call.sigmas[layer.position] = sigma;
  });
  return *record;
}

}  // namespace bssn::cuda
