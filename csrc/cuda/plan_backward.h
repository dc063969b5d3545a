// How a backward call is cut into tiles.
#pragma once

#include "order_backward.h"

namespace bssn::cuda {

// Elements, at most. Blocks wait for the sums of all tiles, so that small ones are better; dW has more to do for a tile
// before its first element.
constexpr int64_t kDotTile = 8192, kGradientTile = 16384;

// Describes how a layer's memory order leads through its vectors.
inline void plan_memory_order(const Layer& layer, BackwardLayer& out) {
  struct Dimension {
    int64_t size, stride;
    uint8_t steps[4];  // in u_out [o], v_out [i, k], u_in [i], v_in [o, k]
  };
  Dimension dimensions[3] = {{layer.c_out, layer.stride_out, {1, 0, 0, kKernelStep}},
                             {layer.c_in, layer.stride_in, {0, kKernelStep, 1, 0}},
                             {layer.kernel, layer.stride_kernel, {0, 1, 0, 1}}};
  // The stride of a dimension of size 1 means nothing: it goes last, or to the middle, so that rows are dimension 2.
  std::sort(dimensions, dimensions + 3, [](const Dimension& a, const Dimension& b) {
    return (a.size == 1) != (b.size == 1) ? b.size == 1 : a.stride < b.stride;
  });
  if (dimensions[2].size == 1) std::swap(dimensions[1], dimensions[2]);
  // By directions, and those of dimension 2 first. In place of those that are missing v_out is read, which has an
  // element for each row of theirs.
  const bool by_input = dimensions[2].steps[2] != 0;
  out.directions = layer.two_sided ? 3 : by_input ? 2 : 1;
  for (int v = 0; v < 4; ++v) {
    const int from = by_input ? v ^ 2 : v;
    const bool exists = layer.two_sided || from < 2;
    out.vectors[v] = layer.snapshot[exists ? from : 1];
    for (int d = 0; d < 3; ++d) out.steps[v][d] = exists ? dimensions[d].steps[from] : uint8_t(0);
  }
  out.inner = divisor(dimensions[0].size);
  out.plane = divisor(dimensions[0].size * dimensions[1].size);
  out.middle = uint32_t(dimensions[1].size);
  out.kernel = uint32_t(layer.kernel);
}

// Cuts the gradient into tiles of some columns of some rows, if its memory is rows that can be moved in pieces: see
// backward_rows.h. Few rows would not be worth what is done for the columns first.
inline void plan_rows(const Layer& layer, uint32_t tile_elements, BackwardLayer& to) {
  const auto is_aligned_to_16 = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; };
  const int64_t row = to.plane.value, rows = layer.size() / row;
  const bool of_channels = to.steps[0][2] == 1 || to.steps[3][2] == kKernelStep;
  to.rows = {};
  if (!of_channels || row % kBackwardPiece != 0 || rows < 4 || !is_aligned_to_16(layer.grad) ||
      !is_aligned_to_16(layer.output)) {
    to.write_tiles = uint32_t(divide_up(layer.size(), tile_elements));
    return;
  }
  // As many tiles beside each other as leave the fewest threads without work.
  const int64_t pieces = row / kBackwardPiece, least = divide_up(pieces, kBackwardThreads);
  int64_t blocks = least, most = 0;
  for (int64_t n = least; n < least + 9; ++n) {
    const int64_t width = divide_up(pieces, n), at_once = kBackwardThreads / width;
    if (n > least && width < 64) break;
    const int64_t busy = pieces * at_once / n;
    if (busy <= most) continue;
    most = busy;
    blocks = n;
  }
  const int64_t width = divide_up(pieces, blocks), at_once = std::min(kBackwardThreads / width, rows);
  const int64_t of_step = width * kBackwardPiece * at_once;
  const int64_t steps =
      std::max<int64_t>(1, (tile_elements / of_step + 2) / 4) * 4;  // a thread loads four rows at a time
  to.rows = {uint32_t(blocks), uint32_t(steps * at_once), uint16_t(width), uint16_t(at_once)};
  to.write_tiles = uint32_t(blocks * divide_up(rows, steps * at_once));
}

// As plan_forward.
inline Plan plan_backward(const std::vector<Layer>& layers, const Device& device, bool one_launch, BackwardCall& call,
                          BackwardLayer* out, Segment* segments) {
  const int64_t total = total_size(layers);
  const int n = int(layers.size());
  Plan plan = {0, counter_bytes(counter_words(n)), 0, 0, kBackwardShared, {}};
  call.dot_elements = flat_tile(total, device, kDotTile);
  call.write_elements = flat_tile(total, device, kGradientTile);
  uint32_t tiles = 0;
  for (int j = 0; j < n; ++j) {
    const Layer& layer = layers[size_t(j)];
    BackwardLayer& to = out[j];
    to.weight = layer.weight;
    to.grad = layer.grad;
    to.output = layer.output;
    to.sigma = layer.sigma;
    to.number = number_of(layer);
    to.law = uint8_t(layer.law.kind);
    to.grad_gain = layer.grad_gain;
    to.size = uint32_t(layer.size());
    plan_memory_order(layer, to);
    plan_rows(layer, call.write_elements, to);
    to.dot_tiles = uint32_t(divide_up(layer.size(), call.dot_elements));
    to.sums = tiles;
    tiles += to.dot_tiles;
  }
  BackwardOrder order(out, uint32_t(n), call.dot_elements, device.multiprocessors * kBackwardBlocks, segments);
  plan.phase_first = one_launch ? order.emit_one_launch() : order.emit_phases();
  call.n_segments = order.n_segments();

  const int64_t records_at = plan.counter_bytes;
  const int64_t sums_at = records_at + n * int64_t(sizeof(BackwardRecord));
  call.counters = nullptr;
  call.records = reinterpret_cast<BackwardRecord*>(records_at);
  call.sums = reinterpret_cast<double*>(sums_at);
  plan.workspace_bytes = sums_at + tiles * int64_t(sizeof(double));
  plan_table<BackwardLayer>(plan, n, n * kBackwardSegments);
  return plan;
}

inline void set_workspace(BackwardCall& call, uintptr_t workspace) {
  add_address(call.counters, workspace);
  add_address(call.records, workspace);
  add_address(call.sums, workspace);
}

}  // namespace bssn::cuda
