// The forward kernel, for one dtype of the weights.
#pragma once

#include "forward.h"
#include "kernels.h"
#include "work.cuh"

namespace bssn::cuda {

// No lambda, as the compiler does not inline one of this size, and would put the block's registers into memory.
template <class W, class Args>
struct ForwardTicket {
  const Args& args;

  __device__ __forceinline__ void operator()(DeviceBlock<kThreads>& block, uint32_t ticket) const {
    forward_ticket<W>(block, args, ticket);
  }
};

template <class W, class Args>
__global__ void __launch_bounds__(kThreads, kForwardBlocks) forward_kernel(const __grid_constant__ Args args) {
  work_through<kThreads>(args.call, ForwardTicket<W, Args>{args});
}

template <class W>
Kernels forward_kernels_of() {
  return {reinterpret_cast<const void*>(&forward_kernel<W, ForwardArgs<kSmallCapacity>>),
          reinterpret_cast<const void*>(&forward_kernel<W, ForwardArgs<kMaxByValue>>),
          reinterpret_cast<const void*>(&forward_kernel<W, ForwardTableArgs>)};
}

}  // namespace bssn::cuda
