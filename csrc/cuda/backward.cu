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

struct Settings {
  DType weight_type, grad_type;
  double scale;
  bool one_launch;
};

// planned: the arguments' own layers, or what becomes the table that they point to.
template <class Args>
int run(Args& args, BackwardLayer* planned, const std::vector<Layer>& layers, const Settings& settings, void* workspace,
        const Device& limits, cudaStream_t stream) {
  BackwardCall& call = args.call;
  call.scale = settings.scale;
  call.grad_type = int32_t(settings.grad_type);
  const Plan plan = plan_backward(layers, limits, call, planned);
  set_workspace(call, reinterpret_cast<uintptr_t>(workspace));
  if (const int error = launch_table(args, planned, layers.size(), workspace, plan, stream)) return error;
  const cudaError_t error = cudaMemsetAsync(call.counters, 0, size_t(plan.counter_bytes), stream);
  if (error != cudaSuccess) return error;
  return launch_phases(call, kBackwardPhases, settings.one_launch,
                       [&] { return int(launch(settings.weight_type, args, limits, plan.shared_bytes, stream)); });
}

}  // namespace

int64_t backward_workspace(const Geometry* geometry, int64_t n, int device) {
  Device limits;
  const cudaError_t error = query_device(device, limits);
  if (error != cudaSuccess) return -int64_t(error);
  const std::vector<Layer> layers = layers_without_memory(geometry, n);
  std::vector<BackwardLayer> planned(layers.size());
  BackwardCall call = {};
  return plan_backward(layers, limits, call, planned.data()).workspace_bytes;
}

int backward(const Geometry* geometry, int64_t n, void* const* pointers, float* snapshot, DType weight_type,
             DType grad_type, double scale, void* workspace, bool one_launch, int device, void* stream) {
  Device limits;
  const cudaError_t error = query_device(device, limits);
  if (error != cudaSuccess) return error;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const std::vector<Layer> layers = backward_layers(geometry, n, pointers, snapshot);
  const Settings settings = {weight_type, grad_type, scale, one_launch};
  return with_arguments<BackwardArgs, BackwardTableArgs, BackwardLayer>(n, [&](auto& args, BackwardLayer* planned) {
    return run(args, planned, layers, settings, workspace, limits, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace bssn::cuda
