// The forward kernel and its launch.
#include <atomic>

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

struct Settings {
  DType weight_type, output_type;
  double scale, eps;
  int64_t iterations;
  bool one_launch;
};

// planned: the arguments' own layers, or what becomes the table that they point to.
template <class Args>
int run(Args& args, ForwardLayer* planned, const std::vector<Layer>& layers, const Settings& settings, void* workspace,
        const Device& limits, cudaStream_t stream) {
  ForwardCall& call = args.call;
  call.scale = settings.scale;
  call.eps = settings.eps;
  call.output_type = int32_t(settings.output_type);
  call.update = settings.iterations > 0;
  const Plan plan = plan_forward(layers, settings.weight_type, limits, call, planned);
  set_workspace(call, reinterpret_cast<uintptr_t>(workspace));
  if (const int error = launch_table(args, planned, layers.size(), workspace, plan, stream)) return error;
  return launch_forward(
      call, settings.iterations, settings.one_launch,
      [&] { return int(cudaMemsetAsync(call.counters, 0, size_t(plan.counter_bytes), stream)); },
      [&] { return int(launch(settings.weight_type, args, limits, plan.shared_bytes, stream)); });
}

// What was compiled for a device, or for an older one from which the driver has made code.
cudaError_t code_for(int device, cudaFuncAttributes& attributes) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  return cudaFuncGetAttributes(&attributes, forward_kernel<float, ForwardTableArgs>);
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
  ForwardCall call = {};
  call.update = true;
  return plan_forward(layers, weight_type, limits, call, planned.data()).workspace_bytes;
}

int forward(const Geometry* geometry, int64_t n, void* const* pointers, float* snapshot, float* sigma,
            DType weight_type, DType output_type, double scale, double eps, int64_t iterations, void* workspace,
            bool one_launch, int device, void* stream) {
  Device limits;
  const cudaError_t error = limits_of(device, limits);
  if (error != cudaSuccess) return error;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const std::vector<Layer> layers = forward_layers(geometry, n, pointers, snapshot, sigma);
  const Settings settings = {weight_type, output_type, scale, eps, iterations, one_launch};
  return with_arguments<ForwardArgs, ForwardTableArgs, ForwardLayer>(n, [&](auto& args, ForwardLayer* planned) {
    return run(args, planned, layers, settings, workspace, limits, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace bssn::cuda
