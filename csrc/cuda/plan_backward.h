// How a backward call is cut into tiles.
#pragma once

#include "backward_args.h"
#include "plan.h"
#include <cstdlib>

namespace bssn::cuda {

// What adding up one number of each thread takes; more, and fewer blocks fit on a multiprocessor.
constexpr uint32_t kBackwardShared = kAreaAt + kBackwardThreads * sizeof(double);

// Describes how a layer's memory order leads through its vectors.
inline void plan_memory_order(const Layer& layer, BackwardLayer& out) {
  struct Dimension {
    int64_t size, stride;
    uint32_t steps[4];  // in u_out [o], v_out [i, k], u_in [i], v_in [o, k]
  };
  const uint32_t kernel = uint32_t(layer.kernel);
  Dimension dimensions[3] = {{layer.c_out, layer.stride_out, {1, 0, 0, kernel}},
                             {layer.c_in, layer.stride_in, {0, kernel, 1, 0}},
                             {layer.kernel, layer.stride_kernel, {0, 1, 0, 1}}};
  // The stride of a dimension of size 1 means nothing: it goes last.
  std::sort(dimensions, dimensions + 3, [](const Dimension& a, const Dimension& b) {
    return (a.size == 1) != (b.size == 1) ? b.size == 1 : a.stride < b.stride;
  });
  for (int d = 0; d < 3; ++d) {
    for (int v = 0; v < 4; ++v) out.steps[v][d] = dimensions[d].steps[v];
  }
  out.inner = divisor(dimensions[0].size);
  out.plane = divisor(dimensions[0].size * dimensions[1].size);
  out.middle = uint32_t(dimensions[1].size);
}

// As plan_forward.
inline Plan plan_backward(const std::vector<Layer>& layers, const Device& device, bool one_launch, BackwardCall& call,
                          BackwardLayer* out, Segment* segments) {
  const int64_t total = total_size(layers);
  const int n = int(layers.size());
  Plan plan = {0, counter_bytes(n), 0, 0, kBackwardShared, {}};
  call.n_segments = n * kBackwardPhases;
  call.tile_elements = flat_tile(total, device, std::getenv("BSSN_BWD_TILE") ? std::atoi(std::getenv("BSSN_BWD_TILE")) : 16384);
  uint32_t tiles = 0;
  std::vector<std::array<Stage, kBackwardPhases>> stages;
  for (int j = 0; j < n; ++j) {
    const Layer& layer = layers[size_t(j)];
    BackwardLayer& to = out[j];
    to.weight = layer.weight;
    to.grad = layer.grad;
    to.output = layer.output;
    for (int v = 0; v < 4; ++v) to.vectors[v] = layer.snapshot[v];
    to.sigma = layer.sigma;
    to.number = number_of(layer);
    to.law = uint8_t(layer.law.kind);
    to.grad_gain = layer.grad_gain;
    to.size = uint32_t(layer.size());
    plan_memory_order(layer, to);
    to.tiles = uint32_t(divide_up(layer.size(), call.tile_elements));
    to.sums = tiles;
    tiles += to.tiles;
    const Stage stage = {to.tiles, double(call.tile_elements)};  // both read or write two numbers for each element
    stages.push_back({{stage, stage}});
  }
  plan.phase_first = order_segments(stages, one_launch, device.multiprocessors * kBackwardBlocks, segments);

  const int64_t records_at = plan.counter_bytes;
  const int64_t sums_at = records_at + n * int64_t(sizeof(BackwardRecord));
  call.counters = nullptr;
  call.records = reinterpret_cast<BackwardRecord*>(records_at);
  call.sums = reinterpret_cast<double*>(sums_at);
  plan.workspace_bytes = sums_at + tiles * int64_t(sizeof(double));
  plan_table<BackwardLayer>(plan, n, call.n_segments);
  return plan;
}

inline void set_workspace(BackwardCall& call, uintptr_t workspace) {
  add_address(call.counters, workspace);
  add_address(call.records, workspace);
  add_address(call.sums, workspace);
}

}  // namespace bssn::cuda
