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
  bool one_launch;
};

// planned, segments: the arguments' own, or what becomes the table that they point to.
template <class Args>
int run(Args& args, ForwardLayer* planned, Segment* segments, const std::vector<Layer>& layers,
        const Settings& settings, void* workspace, const Device& limits, cudaStream_t stream) {
  ForwardCall& call = args.call;
  call.sigmas = settings.sigmas;
  call.eps = settings.eps;
  call.output_type = int32_t(settings.output_type);
  call.update = settings.iterations > 0;
  const Plan plan = plan_forward(layers, settings.weight_type, limits, settings.one_launch, call, planned, segments);
  set_workspace(call, reinterpret_cast<uintptr_t>(workspace));
  if (const int error = launch_tables(args, planned, segments, int64_t(layers.size()), workspace, plan, stream)) {
    return error;
  }
  const Kernels kernels = forward_kernels(settings.weight_type);
  return launch_forward(
      call, plan, settings.iterations,
      [&] { return int(cudaMemsetAsync(call.counters, 0, size_t(plan.counter_bytes), stream)); },
      [&] { return int(launch_kernel(kernels, args, kThreads, kForwardBlocks, limits, plan.shared_bytes, stream)); });
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
  static std::atomic<int> kept[kKept];  // 0: not asked for yet
  limits.columns = device < kKept ? kept[device].load(std::memory_order_relaxed) : 0;
  if (limits.columns == 0) {
    cudaFuncAttributes attributes;
    const cudaError_t second = code_for(device, attributes);
    if (second != cudaSuccess) return second;
    limits.columns = columns_of_code(attributes.ptxVersion);
    if (device < kKept) kept[device].store(limits.columns, std::memory_order_relaxed);
  }
  return cudaSuccess;
}

}  // namespace

int status(int device) {
  cudaFuncAttributes attributes;
  return code_for(device, attributes);
}

int64_t forward_workspace(const Geometry* geometry, int64_t n, DType weight_type, int device) {
  Device limits;
  const cudaError_t error = limits_of(device, limits);
  if (error != cudaSuccess) return -int64_t(error);
  const std::vector<Layer> layers = layers_without_memory(geometry, n);
  std::vector<ForwardLayer> planned(layers.size());
  std::vector<Segment> segments(layers.size() * kPhases);
  ForwardCall call = {};
  call.update = true;
  return plan_forward(layers, weight_type, limits, true, call, planned.data(), segments.data()).workspace_bytes;
}

int forward(const Geometry* geometry, int64_t n, void* const* pointers, float* snapshot, float* sigma,
            DType weight_type, DType output_type, const Law* laws, double eps, int64_t iterations, void* workspace,
            bool one_launch, int device, void* stream) {
  Device limits;
  const cudaError_t error = limits_of(device, limits);
  if (error != cudaSuccess) return error;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const std::vector<Layer> layers = forward_layers(geometry, n, pointers, snapshot, sigma, laws);
  const Settings settings = {weight_type, output_type, sigma, eps, iterations, one_launch};
  return with_arguments<ForwardArgs, ForwardTableArgs, ForwardLayer, kPhases>(
      n, [&](auto& args, ForwardLayer* planned, Segment* segments) {
        return run(args, planned, segments, layers, settings, workspace, limits, static_cast<cudaStream_t>(stream));
      });
}

}  // namespace bssn::cuda
