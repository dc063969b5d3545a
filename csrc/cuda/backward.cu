// The backward kernel and its launch.
#include "backward.h"
#include "cuda.h"
#include "launch.cuh"
#include "plan_backward.h"

namespace bssn::cuda {
namespace {

template <class W, class Args>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks)
    backward_kernel(const __grid_constant__ Args args) {
  work_through<kBackwardThreads>(args.call, [&](DeviceBlock<kBackwardThreads>& block, uint32_t ticket) {
    backward_ticket<W>(block, args, ticket);
  });
}

template <class Args>
cudaError_t launch(DType weight_type, Args& args, const Device& limits, uint32_t shared_bytes, cudaStream_t stream) {
  switch (weight_type) {
    case DType::f32:
      return launch_kernel(backward_kernel<float, Args>, args, kBackwardThreads, kBackwardBlocks, limits, shared_bytes,
                           stream);
    case DType::bf16:
      return launch_kernel(backward_kernel<BFloat16, Args>, args, kBackwardThreads, kBackwardBlocks, limits,
                           shared_bytes, stream);
    case DType::f16:
      return launch_kernel(backward_kernel<Float16, Args>, args, kBackwardThreads, kBackwardBlocks, limits,
                           shared_bytes, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <int Capacity>
int run(const Layer* layers, int n, DType weight_type, DType grad_type, double scale, void* workspace, bool one_launch,
        const Device& limits, cudaStream_t stream) {
  BackwardArgs<Capacity> args;
  BackwardCall& call = args.call;
  call.scale = scale;
  call.grad_type = int32_t(grad_type);
  const Plan plan = plan_backward(layers, n, limits, call, args.layers);
  set_workspace(call, reinterpret_cast<uintptr_t>(workspace));
  const cudaError_t error = cudaMemsetAsync(call.counters, 0, size_t(plan.counter_bytes), stream);
  if (error != cudaSuccess) return error;
  return launch_phases(call, kBackwardPhases, one_launch,
                       [&] { return int(launch(weight_type, args, limits, plan.shared_bytes, stream)); });
}

}  // namespace

int64_t backward_workspace(const Geometry* geometry, int64_t n, int device) {
  Device limits;
  const cudaError_t error = query_device(device, limits);
  if (error != cudaSuccess) return -int64_t(error);
  return largest_workspace(geometry, n, [&](const Layer* layers, int count) {
    BackwardCall call = {};
    BackwardLayer planned[kMaxLayers];
    return plan_backward(layers, count, limits, call, planned);
  });
}

int backward(const Geometry* geometry, int64_t n, void* const* pointers, float* snapshot, DType weight_type,
             DType grad_type, double scale, void* workspace, bool one_launch, int device, void* stream) {
  Device limits;
  const cudaError_t error = query_device(device, limits);
  if (error != cudaSuccess) return error;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  return for_backward_layers(geometry, n, pointers, snapshot, [&](const Layer* layers, int count) {
    const auto run_with = count <= kSmallCapacity ? run<kSmallCapacity> : run<kMaxLayers>;
    return run_with(layers, count, weight_type, grad_type, scale, workspace, one_launch, limits,
                    static_cast<cudaStream_t>(stream));
  });
}

}  // namespace bssn::cuda
