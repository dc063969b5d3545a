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
constexpr uint32_t kAreaAt = kResultsAt + kMaxSums * (kSumParts + 1) * sizeof(double);  // stages, scratch
constexpr uint32_t kMinShared = kAreaAt + 2 * kSplitElements * sizeof(float);
static_assert(kMinShared >= kAreaAt + kMaxSums * kThreads * sizeof(double), "block_sums");
static_assert(kResultsAt % 16 == 0 && kAreaAt % 16 == 0, "doubles, and copies of 16 bytes");

// Sums `N` numbers over the threads of a block: get(thread, x) gives the N of one thread. Returns them in shared
// memory.
template <int N, class Block, class Get>
BSSN_HD const double* block_sums(Block& block, Get get) {
  static_assert(N <= kMaxSums, "shared memory");
  double* const scratch = block.template shared<double>(kAreaAt);
  double* const parts = block.template shared<double>(kResultsAt);
  double* const results = parts + kMaxSums * kSumParts;
  block.each([&](int thread) {
    double x[N] = {};
    get(thread, x);
    BSSN_UNROLL
    for (int j = 0; j < N; ++j) scratch[j * Block::kThreads + thread] = x[j];
  });
  block.each([&](int thread) {
    if (thread >= N * kSumParts) return;
    double sum = 0;
    const double* const mine = scratch + thread / kSumParts * Block::kThreads + thread % kSumParts;
    for (int j = 0; j < Block::kThreads; j += kSumParts) sum += mine[j];
    parts[thread] = sum;
  });
  block.each([&](int thread) {
    if (thread >= N) return;
    double sum = 0;
    for (int j = 0; j < kSumParts; ++j) sum += parts[thread * kSumParts + j];
    results[thread] = sum;
  });
  return results;
}

}  // namespace bssn::cuda
