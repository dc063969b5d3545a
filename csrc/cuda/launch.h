// What forward.cpp and backward.cpp share: the device's limits, the right device, the launch itself.
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>
#include <vector>

#include "kernels.h"

namespace bssn::cuda {

// Makes a device current for the calling thread and puts the former one back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&former_);
    if (error_ == cudaSuccess && former_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(former_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int former_ = 0;
  cudaError_t error_ = cudaSuccess;
  bool changed_ = false;
};

cudaError_t query_device(int device, Device& limits);

// Calls f(args, planned, segments) with the kind of arguments that suits a call of n layers, and the places for
// the descriptions of layers and segments.
template <template <int> class ByValue, class Table, class Planned, int Phases, class F>
int with_arguments(int64_t n, F f) {
  static_assert(sizeof(ByValue<kSmallCapacity>) <= 4096 && sizeof(ByValue<kMaxByValue>) <= kMaxArgumentBytes);
  if (n <= kSmallCapacity) {
    ByValue<kSmallCapacity> args;
    return f(args, args.layers, args.segments);
  }
  if (n <= kMaxByValue) {
    ByValue<kMaxByValue> args;
    return f(args, args.layers, args.segments);
  }
  std::vector<Planned> planned(static_cast<size_t>(n));
  std::vector<Segment> segments(static_cast<size_t>(n) * Phases);
  Table args;
  return f(args, planned.data(), segments.data());
}

// Writes a part of the table. What a launch returns is about this launch; cudaGetLastError would return the error of
// any call before, of other libraries too.
template <class Planned>
int launch_table(const Planned* planned, int64_t n, Planned* table, cudaStream_t stream) {
  return for_table_chunks(planned, size_t(n), table, [&](TableChunk<Planned>& chunk) {
    void* arguments[] = {&chunk};
    return int(cudaLaunchKernel(table_kernel(planned), dim3(1), dim3(1024), arguments, 0, stream));
  });
}

// Puts layers and segments into the table that the arguments point to, if they do.
template <class Args, class Planned>
int launch_tables(Args& args, const Planned* planned, const Segment* segments, int64_t n, void* workspace,
                  const Plan& plan, cudaStream_t stream) {
  if constexpr (std::is_pointer_v<decltype(args.layers)>) {
    unsigned char* const start = static_cast<unsigned char*>(workspace);
    Planned* const layers_there = reinterpret_cast<Planned*>(start + plan.table_at);
    Segment* const segments_there = reinterpret_cast<Segment*>(start + plan.segments_at);
    args.layers = layers_there;
    args.segments = segments_there;
    if (const int error = launch_table(planned, n, layers_there, stream)) return error;
    return launch_table(segments, args.call.n_segments, segments_there, stream);
  }
  return 0;
}

// Of a launch: blocks, threads of each, blocks of a cluster, bytes of shared memory of a block.
struct Grid {
  int64_t blocks, threads, cluster;
  uint32_t shared_bytes;
};

// As many blocks as fit at a time, if there are tickets for them.
inline Grid grid_of(uint32_t tickets, int64_t blocks, int64_t threads, uint32_t shared_bytes) {
  return {std::min(int64_t(tickets), blocks), threads, 1, shared_bytes};
}

template <class Args>
cudaError_t launch_kernel(const Kernels& kernels, Args& args, const Grid& grid, const Device& limits,
                          cudaStream_t stream) {
  const void* const kernel = std::is_pointer_v<decltype(args.layers)> ? kernels.table
                             : sizeof(Args) <= 4096                   ? kernels.small
                                                                      : kernels.by_value;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(limits.shared_bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(grid.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(grid.blocks));
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  void* arguments[] = {&args};
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace bssn::cuda
