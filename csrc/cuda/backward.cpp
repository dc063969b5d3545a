// The backward call, on the host.
#include "cuda.h"
#include "launch.h"
#include "plan_backward.h"

namespace bssn::cuda {
namespace {

struct Settings {
  DType weight_type, grad_type;
  float* grad_gains;
  Way way;
};

// planned, segments: the arguments' own, or what becomes the table that they point to.
template <class Args>
int run(Args& args, BackwardLayer* planned, Segment* segments, const std::vector<Layer>& layers,
        const Settings& settings, void* workspace, const Device& limits, cudaStream_t stream) {
  BackwardCall& call = args.call;
  call.grad_gains = settings.grad_gains;
  const Plan plan = plan_backward(layers, settings.grad_type, limits, settings.way, call, planned, segments);
  set_workspace(call, reinterpret_cast<uintptr_t>(workspace));
  if (const int error = launch_tables(args, planned, segments, int64_t(layers.size()), workspace, plan, stream)) {
    return error;
  }
  const cudaError_t error = cudaMemsetAsync(call.counters, 0, size_t(plan.counter_bytes), stream);
  if (error != cudaSuccess) return error;
  const Kernels kernels = backward_kernels(settings.weight_type);
  return launch_phases(call, plan, [&] {
    const Grid grid = grid_of(call.end_ticket - call.first_ticket, limits.multiprocessors * kBackwardBlocks,
                              kBackwardThreads, plan.shared_bytes);
    return int(launch_kernel(kernels, args, grid, limits, stream));
  });
}

}  // namespace

int64_t backward_workspace(const Geometry* geometry, int64_t n, DType grad_type, Way way, int device) {
  Device limits;
  const cudaError_t error = query_device(device, limits);
  if (error != cudaSuccess) return -int64_t(error);
  return backward_workspace_bytes(geometry, n, grad_type, limits, way);
}

int backward(const Geometry* geometry, int64_t n, void* const* pointers, float* snapshot, DType weight_type,
             DType grad_type, const Law* laws, float* grad_gains, void* workspace, Way way, int device, void* stream) {
  Device limits;
  const cudaError_t error = query_device(device, limits);
  if (error != cudaSuccess) return error;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const std::vector<Layer> layers = backward_layers(geometry, n, pointers, snapshot, laws);
  const Settings settings = {weight_type, grad_type, grad_gains, way};
  return with_arguments<BackwardArgs, BackwardTableArgs, BackwardLayer, kBackwardSegments>(
      n, [&](auto& args, BackwardLayer* planned, Segment* segments) {
        return run(args, planned, segments, layers, settings, workspace, limits, static_cast<cudaStream_t>(stream));
      });
}

}  // namespace bssn::cuda
