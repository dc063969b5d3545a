// What all kernels do: take tickets until none is left.
#pragma once

#include "block.cuh"

namespace bssn::cuda {

// Works through the launch's tickets: process(block, ticket). See tickets.h for why that cannot hang.
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

}  // namespace bssn::cuda
