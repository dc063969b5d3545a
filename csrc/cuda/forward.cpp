// The forward call, on the host.
#include <atomic>

#include "cuda.h"
#include "launch.h"
#include "plan_forward.h"

namespace bssn::cuda {
namespace {

struct Settings {
  DType weight_type, output_type;
  float* sigmas;
  double eps;
  int64_t iterations;
  Way way;
};

// As many blocks as fit at a time and have something to do, in whole clusters if layers are in one.
Grid grid_of(const ForwardCall& call, const Plan& plan, const Device& limits) {
  const int64_t blocks = limits.multiprocessors * kForwardBlocks;
  const uint32_t tickets = call.end_ticket - call.first_ticket;
  Grid grid = cuda::grid_of(tickets + call.whole_layers * kCluster, blocks, kThreads, plan.shared_bytes);
  if (call.whole_layers > 0) {
    grid.cluster = kCluster;
    grid.blocks = std::max(grid.blocks / kCluster, int64_t(1)) * kCluster;
  }
  return grid;
}

// planned, segments: the arguments' own, or what becomes the table that they point to.
template <class Args>
int run(Args& args, ForwardLayer* planned, Segment* segments, const std::vector<Layer>& layers,
        const Settings& settings, void* workspace, const Device& limits, cudaStream_t stream) {
  ForwardCall& call = args.call;
  call.sigmas = settings.sigmas;
  call.eps = settings.eps;
  call.output_type = int32_t(settings.output_type);
  call.update = settings.iterations > 0;
  const Plan plan = plan_forward(layers, settings.weight_type, limits, settings.way, call, planned, segments);
  set_workspace(call, reinterpret_cast<uintptr_t>(workspace));
  if (const int error = launch_tables(args, planned, segments, int64_t(layers.size()), workspace, plan, stream)) {
    return error;
  }
  const Kernels kernels = forward_kernels(settings.weight_type);
  return launch_forward(
      call, plan, settings.iterations,
      [&] { return int(cudaMemsetAsync(call.counters, 0, size_t(plan.counter_bytes), stream)); },
      [&] { return int(launch_kernel(kernels, args, grid_of(call, plan, limits), limits, stream)); });
}

// What was compiled for a device, or for an older one from which the driver has made code.
cudaError_t code_for(int device, cudaFuncAttributes& attributes) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  return cudaFuncGetAttributes(&attributes, forward_kernels_f32().table);
}

cudaError_t limits_of(int device, Device& limits) {
  const cudaError_t error = query_device(device, limits);
  if (error != cudaSuccess) return error;
  constexpr int kKept = 64;
  static std::atomic<int> kept[kKept];  // the code's architecture; 0: not asked for yet
  int code = device < kKept ? kept[device].load(std::memory_order_relaxed) : 0;
  if (code == 0) {
    cudaFuncAttributes attributes;
    const cudaError_t second = code_for(device, attributes);
    if (second != cudaSuccess) return second;
    code = attributes.ptxVersion;
    if (device < kKept) kept[device].store(code, std::memory_order_relaxed);
  }
  limits.columns = columns_of_code(code);
  limits.has_clusters = clusters_in_code(code);
  limits.can_keep = keeping_in_code(code);
  return cudaSuccess;
}

}  // namespace

int status(int device) {
  cudaFuncAttributes attributes;
  return code_for(device, attributes);
}

int64_t forward_workspace(const Geometry* geometry, int64_t n, DType weight_type, Way way, int device) {
  Device limits;
  const cudaError_t error = limits_of(device, limits);
  if (error != cudaSuccess) return -int64_t(error);
  return forward_workspace_bytes(geometry, n, weight_type, limits, way);
}

int forward(const Geometry* geometry, int64_t n, void* const* pointers, float* snapshot, float* sigma,
            DType weight_type, DType output_type, const Law* laws, double eps, int64_t iterations, void* workspace,
            Way way, int device, void* stream) {
  Device limits;
  const cudaError_t error = limits_of(device, limits);
  if (error != cudaSuccess) return error;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const std::vector<Layer> layers = forward_layers(geometry, n, pointers, snapshot, sigma, laws);
  const Settings settings = {weight_type, output_type, sigma, eps, iterations, way};
  return with_arguments<ForwardArgs, ForwardTableArgs, ForwardLayer, kPhases>(
      n, [&](auto& args, ForwardLayer* planned, Segment* segments) {
        return run(args, planned, segments, layers, settings, workspace, limits, static_cast<cudaStream_t>(stream));
      });
}

}  // namespace bssn::cuda
