// The kernels, as the host knows them. Each dtype is compiled by itself, several at a time.
#pragma once

#include "backward_args.h"
#include "plan.h"

namespace bssn::cuda {

// One kernel for each kind of arguments.
struct Kernels {
  const void *small, *by_value, *table;
};

Kernels forward_kernels_f32();
Kernels forward_kernels_bf16();
Kernels forward_kernels_f16();
Kernels backward_kernels(DType weight_type);

inline Kernels forward_kernels(DType weight_type) {
  switch (weight_type) {
    case DType::f32:
      return forward_kernels_f32();
    case DType::bf16:
      return forward_kernels_bf16();
    default:
      return forward_kernels_f16();
  }
}

// Those that write a TableChunk, the only argument, with 1024 threads.
const void* table_kernel(const ForwardLayer*);
const void* table_kernel(const BackwardLayer*);
const void* table_kernel(const Segment*);

}  // namespace bssn::cuda
