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

// The tiles in which the gradient is written if its memory is rows that can be moved in pieces, of no rows yet: see
// backward_rows.h. Few rows would not be worth what is done for the columns first.
inline RowTiles row_tiles(const BackwardLayer& layer) {
  const int64_t row = layer.plane.value, rows = layer.n_rows();
  const bool of_channels = layer.steps[0][2] == 1 || layer.steps[3][2] == kKernelStep;
  if (!of_channels || row % kBackwardPiece != 0 || rows < 4) return {};
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
  return {uint32_t(blocks), 0, uint16_t(width), uint16_t(at_once)};
}

// In which a block takes all rows of its columns.
inline int64_t steps_of(const BackwardLayer& layer) {
  return divide_up(layer.n_rows(), int64_t(layer.rows.rows_at_once));
}

inline int64_t tiles_of(const BackwardLayer& layer, int64_t steps) {
  return layer.rows.column_blocks * divide_up(steps_of(layer), steps);
}

inline void set_steps(BackwardLayer& layer, int64_t steps) {
  layer.rows.tile_rows = uint32_t(steps * layer.rows.rows_at_once);
  layer.write_tiles = uint32_t(tiles_of(layer, steps));
}

inline bool is_aligned_to_16(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Cuts a layer into tiles of nearly as many elements.
inline void plan_gradient(const Layer& layer, const BackwardCall& call, BackwardLayer& to) {
  to.dot_tiles = uint32_t(divide_up(to.size, call.dot_elements));
  to.write_tiles = uint32_t(divide_up(to.size, call.write_elements));
  to.rows = row_tiles(to);
  if (!is_aligned_to_16(layer.grad) || !is_aligned_to_16(layer.output)) to.rows = {};
  if (to.rows.column_blocks == 0) return;
  const int64_t of_step = int64_t(to.rows.width) * kBackwardPiece * to.rows.rows_at_once;
  // A thread loads four rows at a time.
  set_steps(to, std::max<int64_t>(1, (call.write_elements / of_step + 2) / 4) * 4);
}

// What layers take of the workspace, wherever their memory lies.
struct BackwardRoom {
  int64_t sums, claims;
};

// What all blocks together can keep of G.
struct KeepingRoom {
  int64_t blocks;
  int64_t piece_bytes;
  int64_t steps;  // of a tile

  KeepingRoom(const Device& device, DType grad_type)
      : blocks(int64_t(device.multiprocessors) * kBackwardBlocks),
        piece_bytes(kBackwardPiece * element_size(grad_type)) {
    // A multiprocessor has as much as one block can have and what is reserved of it, for each block, since Ampere.
    constexpr int64_t kReserved = 1024, kUnit = 256;
    const int64_t of_block = ((device.shared_bytes + kReserved) / kBackwardBlocks - kReserved) / kUnit * kUnit;
    steps = std::max<int64_t>(of_block - kBackwardShared, 0) / step_bytes();
  }

  int64_t step_bytes() const { return kBackwardThreads * piece_bytes; }
  int64_t elements() const { return blocks * steps * kBackwardThreads * kBackwardPiece; }
  bool has_place_for(const RowTiles& rows) const {
    return steps > 0 && rows.column_blocks > 0 && rows.column_blocks <= blocks;
  }
};

// The fewest steps of a tile for which a wave of layers has no more tiles than there are blocks.
inline int64_t steps_of_wave(const std::vector<BackwardLayer>& layers, int64_t blocks) {
  constexpr int64_t kFewest = 4;
  int64_t low = kFewest, high = kFewest;
  for (const BackwardLayer& layer : layers) high = std::max(high, steps_of(layer));
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    int64_t tiles = 0;
    for (const BackwardLayer& layer : layers) tiles += tiles_of(layer, middle);
    if (tiles <= blocks) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Where waves of layers begin, and their end. A wave may have some more than there is room for: the rest of it is what
// blocks write while they wait for the records of the next one. Those with no rows to keep go along.
inline std::vector<uint32_t> gradient_waves(const std::vector<BackwardLayer>& layers, const KeepingRoom& room) {
  std::vector<uint32_t> begins;
  int64_t elements = 0, tiles = 0;
  for (uint32_t j = 0; j < layers.size(); ++j) {
    const bool keeps = room.has_place_for(layers[j].rows);
    const int64_t more = keeps ? layers[j].size : 0, more_tiles = keeps ? layers[j].rows.column_blocks : 0;
    if (begins.empty() || elements + more > room.elements() / 3 * 4 || tiles + more_tiles > room.blocks) {
      begins.push_back(j);
      elements = tiles = 0;
    }
    elements += more;
    tiles += more_tiles;
  }
  begins.push_back(uint32_t(layers.size()));
  return begins;
}

// Has layers keep G, wave by wave, but those whose memory cannot be moved in pieces. Returns the waves.
inline std::vector<uint32_t> plan_keeping(const KeepingRoom& room, uint32_t n, BackwardLayer* out, BackwardRoom* rooms,
                                          Plan& plan) {
  std::vector<BackwardLayer> layers(out, out + n);  // as if they all could
  for (BackwardLayer& layer : layers) layer.rows = row_tiles(layer);
  const std::vector<uint32_t> waves = gradient_waves(layers, room);
  for (size_t wave = 0; wave + 1 < waves.size(); ++wave) {
    std::vector<BackwardLayer> keeping;
    for (uint32_t j = waves[wave]; j < waves[wave + 1]; ++j) {
      if (room.has_place_for(layers[j].rows)) keeping.push_back(layers[j]);
    }
    const int64_t most = steps_of_wave(keeping, room.blocks);
    for (uint32_t j = waves[wave]; j < waves[wave + 1]; ++j) {
      if (!room.has_place_for(layers[j].rows)) continue;
      const int64_t steps = std::min(most, steps_of(layers[j])), tiles = tiles_of(layers[j], steps);
      rooms[j] = {std::max(rooms[j].sums, tiles), tiles};
      BackwardLayer& to = out[j];
      if (to.rows.column_blocks == 0 || !is_aligned_to_16(to.weight)) continue;
      set_steps(to, steps);
      to.dot_tiles = to.write_tiles;
      to.kept_steps = uint16_t(std::min(steps, room.steps));
      plan.shared_bytes = std::max(plan.shared_bytes, kBackwardShared + uint32_t(to.kept_steps * room.step_bytes()));
    }
  }
  return waves;
}

inline void plan_layer(const Layer& layer, const BackwardCall& call, BackwardLayer& to) {
  to.weight = layer.weight;
  to.grad = layer.grad;
  to.output = layer.output;
  to.sigma = layer.sigma;
  to.number = number_of(layer);
  to.law = uint8_t(layer.law.kind);
  to.grad_gain = layer.grad_gain;
  to.size = uint32_t(layer.size());
  to.kept_steps = 0;
  plan_memory_order(layer, to);
  plan_gradient(layer, call, to);
}

// As plan_forward.
inline Plan plan_backward(const std::vector<Layer>& layers, DType grad_type, const Device& device, Way way,
                          BackwardCall& call, BackwardLayer* out, Segment* segments) {
  const int64_t total = total_size(layers);
  const uint32_t n = uint32_t(layers.size());
  Plan plan = {0, 0, 0, 0, kBackwardShared, {}};
  call.grad_type = int32_t(grad_type);
  call.dot_elements = flat_tile(total, device, kDotTile);
  call.write_elements = flat_tile(total, device, kGradientTile);
  for (uint32_t j = 0; j < n; ++j) plan_layer(layers[j], call, out[j]);
  std::vector<BackwardRoom> rooms(n);
  for (uint32_t j = 0; j < n; ++j) rooms[j].sums = out[j].dot_tiles;
  std::vector<uint32_t> waves = {0, n};
  if (way == Way::keep) waves = plan_keeping(KeepingRoom(device, grad_type), n, out, rooms.data(), plan);
  int64_t sums = 0, words = counter_words(n);
  for (uint32_t j = 0; j < n; ++j) {
    out[j].sums = uint32_t(sums);
    out[j].claims = uint32_t(words);
    sums += rooms[j].sums;
    words += rooms[j].claims;
  }
  BackwardOrder order(out, n, call.dot_elements, device.multiprocessors * kBackwardBlocks, segments);
  plan.phase_first = way == Way::keep     ? order.emit_waves(waves)
                     : way == Way::phases ? order.emit_phases()
                                          : order.emit_one_launch();
  call.n_segments = order.n_segments();

  plan.counter_bytes = counter_bytes(words);
  const int64_t records_at = plan.counter_bytes;
  const int64_t sums_at = records_at + n * int64_t(sizeof(BackwardRecord));
  call.counters = nullptr;
  call.records = reinterpret_cast<BackwardRecord*>(records_at);
  call.sums = reinterpret_cast<double*>(sums_at);
  plan.workspace_bytes = sums_at + sums * int64_t(sizeof(double));
  plan_table<BackwardLayer>(plan, n, n * kBackwardSegments);
  return plan;
}

// What any backward call with these layers needs.
inline int64_t backward_workspace_bytes(const Geometry* geometry, int64_t n, DType grad_type, const Device& device,
                                        Way way) {
  const std::vector<Layer> layers = ordered_by_size(layers_without_memory(geometry, n));
  std::vector<BackwardLayer> planned(layers.size());
  std::vector<Segment> segments(layers.size() * kBackwardSegments);
  BackwardCall call = {};
  return plan_backward(layers, grad_type, device, way, call, planned.data(), segments.data()).workspace_bytes;
}

inline void set_workspace(BackwardCall& call, uintptr_t workspace) {
  add_address(call.counters, workspace);
  add_address(call.records, workspace);
  add_address(call.sums, workspace);
}

}  // namespace bssn::cuda
