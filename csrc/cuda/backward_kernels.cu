// The backward kernels, and those that write tables.
#include "backward.h"
#include "block.cuh"
#include "kernels.h"

namespace bssn::cuda {
namespace {

template <class W, class Args>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks)
    backward_kernel(const __grid_constant__ Args args) {
  DeviceBlock<kBackwardThreads> block;
  run_backward_block<W>(block, args);
}

template <class W>
Kernels kernels_of() {
  return {reinterpret_cast<const void*>(&backward_kernel<W, BackwardArgs<kSmallCapacity>>),
          reinterpret_cast<const void*>(&backward_kernel<W, BackwardArgs<kMaxByValue>>),
          reinterpret_cast<const void*>(&backward_kernel<W, BackwardTableArgs>)};
}

template <class Chunk>
__global__ void write_table(const __grid_constant__ Chunk chunk) {
  chunk.write(int(threadIdx.x), int(blockDim.x));
}

template <class Planned>
const void* table_kernel_of() {
  return reinterpret_cast<const void*>(&write_table<TableChunk<Planned>>);
}

}  // namespace

Kernels backward_kernels(DType weight_type) {
  switch (weight_type) {
    case DType::f32:
      return kernels_of<float>();
    case DType::bf16:
      return kernels_of<BFloat16>();
    default:
      return kernels_of<Float16>();
  }
}

const void* table_kernel(const ForwardLayer*) { return table_kernel_of<ForwardLayer>(); }
const void* table_kernel(const BackwardLayer*) { return table_kernel_of<BackwardLayer>(); }
const void* table_kernel(const Segment*) { return table_kernel_of<Segment>(); }

}  // namespace bssn::cuda
