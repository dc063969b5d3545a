// What forward.cu and backward.cu share: the device's limits, the right device, the launch itself.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>
#include <vector>

#include "block.cuh"
#include "plan.h"

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

// Works through the launch's tickets: process(block, ticket). See Phase for why that cannot hang.
template <int Threads, class Call, class Process>
__device__ __forceinline__ void work_through(const Call& call, Process process) {
  DeviceBlock<Threads> block;
  uint32_t* const counter = call.counters + call.ticket_counter;
  block.ask_for_ticket(counter);
  for (;;) {
    const uint32_t ticket = call.first_ticket + block.hand_out_ticket();
    if (ticket >= call.end_ticket) return;
    block.ask_for_ticket(counter);
    process(block, ticket);
  }
}

// Calls f(args, planned) with the kind of arguments that suits a call of n layers, and the place for their
// descriptions.
template <template <int> class ByValue, class Table, class Planned, class F>
int with_arguments(int64_t n, F f) {
  static_assert(sizeof(ByValue<kSmallCapacity>) <= 4096 && sizeof(ByValue<kMaxByValue>) <= kMaxArgumentBytes);
  if (n <= kSmallCapacity) {
    ByValue<kSmallCapacity> args;
    return f(args, args.layers);
  }
  if (n <= kMaxByValue) {
    ByValue<kMaxByValue> args;
    return f(args, args.layers);
  }
  std::vector<Planned> planned(static_cast<size_t>(n));
  Table args;
  return f(args, planned.data());
}

template <class Chunk>
__global__ void write_table(const __grid_constant__ Chunk chunk) {
  chunk.write(int(threadIdx.x), int(blockDim.x));
}

// Puts the planned layers into the table that the arguments point to, if they do.
template <class Args, class Planned>
int launch_table(Args& args, const Planned* planned, size_t n, void* workspace, const Plan& plan, cudaStream_t stream) {
  if constexpr (std::is_pointer_v<decltype(args.layers)>) {
    Planned* const table = reinterpret_cast<Planned*>(static_cast<unsigned char*>(workspace) + plan.table_at);
    args.layers = table;
    return for_table_chunks(planned, n, table, [&](const TableChunk<Planned>& chunk) {
      write_table<<<1, 1024, 0, stream>>>(chunk);
      return int(cudaGetLastError());
    });
  }
  return 0;
}

// As many blocks as fit at a time, if there are tickets for them.
template <class Args>
cudaError_t launch_kernel(void (*kernel)(Args), Args& args, int threads, int blocks_each, const Device& limits,
                          uint32_t shared_bytes, cudaStream_t stream) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  const cudaError_t error =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(limits.shared_bytes));
  if (error != cudaSuccess) return error;
  const uint32_t tickets = args.call.end_ticket - args.call.first_ticket;
  const uint32_t blocks = std::min(tickets, uint32_t(limits.multiprocessors * blocks_each));
  void* arguments[] = {&args};
  return cudaLaunchKernel(function, dim3(blocks), dim3(threads), arguments, shared_bytes, stream);
}

}  // namespace bssn::cuda
