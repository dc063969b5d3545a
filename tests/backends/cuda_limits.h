// A GPU as the plans know it, from its limits.
#pragma once

#include "cuda/plan_forward.h"

namespace bssn::cuda {

// Turing's code is the one for 64 KiB of shared memory.
inline Device device_of(int multiprocessors, int64_t shared) {
  return {multiprocessors, shared, columns_of_code(shared <= 64 * 1024 ? 75 : 80)};
}

}  // namespace bssn::cuda
