// The forward kernel and its launch.
#include "cuda.h"
#include "forward.h"
#include "launch.cuh"
#include "plan_forward.h"

namespace bssn::cuda {
namespace {

template <class W, class Args>
__global__ void __launch_bounds__(kThreads, kForwardBlocks) forward_kernel(const __grid_constant__ Args args) {
  work_through<kThreads>(
      args.call, [&](DeviceBlock<kThreads>& block, uint32_t ticket) { forward_ticket<W>(block, args, ticket); });
}

template <class Args>
cudaError_t launch(DType weight_type, Args& args, const Device& limits, uint32_t shared_bytes, cudaStream_t stream) {
  switch (weight_type) {
    case DType::f32:
      return launch_kernel(forward_kernel<float, Args>, args, kThreads, kForwardBlocks, limits, shared_bytes, stream);
    case DType::bf16:
      return launch_kernel(forward_kernel<BFloat16, Args>, args, kThreads, kForwardBlocks, limits, shared_bytes,
                           stream);
    case DType::f16:
      return launch_kernel(forward_kernel<Float16, Args>, args, kThreads, kForwardBlocks, limits, shared_bytes, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <int Capacity>
int run(const Layer* layers, int n, DType weight_type, DType output_type, double scale, double eps, int64_t iterations,
        void* workspace, bool one_launch, const Device& limits, cudaStream_t stream) {
  ForwardArgs<Capacity> args;
  ForwardCall& call = args.call;
  call.scale = scale;
  call.eps = eps;
  call.output_type = int32_t(output_type);
  call.update = iterations > 0;
  const Plan plan = plan_forward(layers, n, weight_type, limits, call, args.layers);
  set_workspace(call, reinterpret_cast<uintptr_t>(workspace));
  return launch_forward(
      call, iterations, one_launch,
      [&] { return int(cudaMemsetAsync(call.counters, 0, size_t(plan.counter_bytes), stream)); },
      [&] { return int(launch(weight_type, args, limits, plan.shared_bytes, stream)); });
}

}  // namespace

int status(int device) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, forward_kernel<float, ForwardArgs<kMaxLayers>>);
}

int64_t forward_workspace(const Geometry* geometry, int64_t n, DType weight_type, int device) {
  Device limits;
  const cudaError_t error = query_device(device, limits);
  if (error != cudaSuccess) return -int64_t(error);
  return largest_workspace(geometry, n, [&](const Layer* layers, int count) {
    ForwardCall call = {};
    ForwardLayer planned[kMaxLayers];
    call.update = true;
    return plan_forward(layers, count, weight_type, limits, call, planned);
  });
}

int forward(const Geometry* geometry, int64_t n, void* const* pointers, float* snapshot, float* sigma,
            DType weight_type, DType output_type, double scale, double eps, int64_t iterations, void* workspace,
            bool one_launch, int device, void* stream) {
  Device limits;
  const cudaError_t error = query_device(device, limits);
  if (error != cudaSuccess) return error;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  return for_forward_layers(geometry, n, pointers, snapshot, sigma, [&](const Layer* layers, int count) {
    const auto run_with = count <= kSmallCapacity ? run<kSmallCapacity> : run<kMaxLayers>;
    return run_with(layers, count, weight_type, output_type, scale, eps, iterations, workspace, one_launch, limits,
                    static_cast<cudaStream_t>(stream));
  });
}

}  // namespace bssn::cuda
