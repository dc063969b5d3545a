// A GPU as the plans know it, from its limits.
#pragma once

#include "cuda/plan_forward.h"

namespace bssn::cuda {

// Turing's code is the one for 64 KiB of shared memory; that for clusters is in use beyond the 163 KiB of an A100, and
// where there is less than any GPU has.
inline Device device_of(int multiprocessors, int64_t shared) {
  const bool has_clusters = shared > 163 * 1024 || shared < 64 * 1024;
  return {multiprocessors, shared, columns_of_code(shared <= 64 * 1024 ? 75 : 80), has_clusters, shared != 64 * 1024};
}

}  // namespace bssn::cuda
