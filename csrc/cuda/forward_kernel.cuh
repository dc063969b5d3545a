// The forward kernel, for one dtype of the weights.
#pragma once

#include "block.cuh"
#include "forward.h"
#include "kernels.h"

namespace bssn::cuda {

template <class W, class Args>
__global__ void __launch_bounds__(kThreads, kForwardBlocks) forward_kernel(const __grid_constant__ Args args) {
  DeviceBlock<kThreads> block;
  run_block<W>(block, args);
}

template <class W>
Kernels forward_kernels_of() {
  return {reinterpret_cast<const void*>(&forward_kernel<W, ForwardArgs<kSmallCapacity>>),
          reinterpret_cast<const void*>(&forward_kernel<W, ForwardArgs<kMaxByValue>>),
          reinterpret_cast<const void*>(&forward_kernel<W, ForwardTableArgs>)};
}

}  // namespace bssn::cuda
