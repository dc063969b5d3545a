// Sums over the threads of a block, always in the same order, and the shared memory that they and the tiles use.
//
// A Block runs a function for each of its threads (`each`, which ends with a barrier): see block.cuh for the GPU's.
#pragma once

#include "forward_args.h"

namespace bssn::cuda {

// Shared memory, in bytes from its start.
constexpr uint32_t kLanesAt = 16;  // before it: the block's own; from there: see LaneSums
constexpr uint32_t kPartsAt = kLanesAt + (1 + kMaxPack) * kThreads * sizeof(float);
constexpr uint32_t kTotalsAt = kPartsAt + (kThreads / kSumParts + kThreads) * sizeof(float);
constexpr uint32_t kResultsAt = kTotalsAt + (kThreads + kMaxGroups) * sizeof(float);
constexpr int kMaxSums = 6;
constexpr uint32_t kSumsAt = kResultsAt + kMaxSums * kSumParts * sizeof(double);        // results of block_sums
constexpr uint32_t kAreaAt = kResultsAt + kMaxSums * (kSumParts + 1) * sizeof(double);  // stages, scratch
constexpr uint32_t kMinShared = kAreaAt + 2 * kSplitElements * sizeof(float);
static_assert(kResultsAt % 16 == 0 && kAreaAt % 16 == 0, "doubles, and copies of 16 bytes");

// Sums `N` numbers over the threads of a block: get(thread, x) gives the N of one thread. Returns them in shared
// memory.
template <int N, class Block, class Get>
BSSN_HD const double* block_sums(Block& block, Get get) {
  constexpr int kWarps = Block::kThreads / 32;
  static_assert(N <= kMaxSums && kWarps <= kSumParts, "shared memory");
  double* const parts = block.template shared<double>(kResultsAt);  // of the warps
  double* const results = block.template shared<double>(kSumsAt);
  block.template sum_lanes<double, N, 1>(get, [&](int warp) { return parts + warp * N; });
  block.sync();
  block.each([&](int thread) {
    if (thread >= N) return;
    double sum = 0;
    BSSN_UNROLL
    for (int warp = 0; warp < kWarps; ++warp) sum += parts[warp * N + thread];
    results[thread] = sum;
  });
  return results;
}

}  // namespace bssn::cuda
