// What forward.cu and backward.cu share: the device's limits, the right device, the launch itself.
#pragma once

#include <cuda_runtime.h>

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

template <class Args>
constexpr bool fits_into_arguments() {
  return sizeof(Args) <= (Args::kCapacity <= kSmallCapacity ? 4096 : 32764);
}

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

// As many blocks as fit at a time, if there are tickets for them.
template <class Args>
cudaError_t launch_kernel(void (*kernel)(Args), Args& args, int threads, int blocks_each, const Device& limits,
                          uint32_t shared_bytes, cudaStream_t stream) {
  static_assert(fits_into_arguments<Args>(), "kernel arguments");
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
