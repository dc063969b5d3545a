// How a forward call is cut into tiles, and their order.
#pragma once

#include "plan_tiles.h"

namespace bssn::cuda {

inline void copy_pointers(const Layer& layer, ForwardLayer& to) {
  to.weight = layer.weight;
  to.output = layer.output;
  for (int v = 0; v < 4; ++v) {
    to.vectors[v] = layer.vectors[v];
    to.snapshot[v] = layer.snapshot[v];
  }
  to.number = number_of(layer);
  to.law = uint8_t(layer.law.kind);
  to.position = uint32_t(layer.position);
}

inline void copy_sizes(const Layer& layer, ForwardLayer& to) {
  to.c_out = int32_t(layer.c_out);
  to.c_in = int32_t(layer.c_in);
  to.kernel = int32_t(layer.kernel);
  to.both_sides = layer.two_sided != 0;
  to.kernel_major = layer.kernel_major();
  to.stride_out = int32_t(layer.stride_out);
  to.stride_in = int32_t(layer.stride_in);
  to.stride_kernel = int32_t(layer.stride_kernel);
}

struct PlannedLayer {
  ForwardLayer layer;
  int64_t shared;  // bytes that a block needs
  bool is_whole;   // a cluster has it to itself
};

// A layer, where `pack` neighbouring elements of a row are taken at a time.
inline PlannedLayer plan_layer(const Layer& layer, int64_t element, const Total& total, const Device& device, int pack,
                               Way way, const ForwardCall& call) {
  PlannedLayer planned = {};
  copy_pointers(layer, planned.layer);
  copy_sizes(layer, planned.layer);
  if (way == Way::clusters) {
    PlannedLayer whole = planned;
    whole.shared = plan_whole(layer, element, device, pack, whole.layer);
    whole.is_whole = true;
    if (whole.shared > 0) return whole;
  }
  planned.shared = plan_tiles(layer, element, total, device, pack, way == Way::keep, call, planned.layer);
  return planned;
}

// What a layer takes of the workspace.
struct Room {
  int64_t shares, reduce_tiles, claims;

  Room(const PlannedLayer& planned, bool update) : shares(0), reduce_tiles(0), claims(0) {
    if (planned.is_whole) return;
    shares = shares_size(planned.layer, update);
    reduce_tiles = planned.layer.tiles[reduce];
    claims = planned.layer.keeps ? planned.layer.tiles[power] : 0;
  }
};

// Where in `layers` the waves begin, and their end: layers of which most rows fit on the chip at the same time.
inline std::vector<size_t> waves_of(const std::vector<Layer>& layers, int64_t element, const Device& device, Way way) {
  if (way != Way::keep) return {0, layers.size()};
  const int64_t room = device.multiprocessors * (device.shared_bytes - kAreaAt) / 4 * 3;  // the rest is for t and r
  std::vector<size_t> begins;
  int64_t bytes = 0;
  for (size_t j = 0; j < layers.size(); ++j) {
    const int64_t more = layers[j].size() * element;
    if (begins.empty() || bytes + more > room) {
      begins.push_back(j);
      bytes = 0;
    }
    bytes += more;
  }
  begins.push_back(layers.size());
  return begins;
}

// Fills in `call`, `out` and `segments` but for the workspace's address (offsets stand in its place) and what is not
// the plan's. out: one for each layer, in the order of `layers`, of which the largest comes first; segments: room for
// kPhases for each. The workspace does not depend on where the weights lie, nor on whether each phase has a launch.
inline Plan plan_forward(const std::vector<Layer>& layers, DType weight_type, const Device& device, Way wanted,
                         ForwardCall& call, ForwardLayer* out, Segment* segments) {
  const Way way = way_on(device, wanted);
  const int64_t element = element_size(weight_type), n = int64_t(layers.size());
  Plan plan = {0, 0, 0, 0, kMinShared, {}};
  call.write_elements = flat_tile(total_size(layers), device, 32768);
  int64_t sums = 0, slots = 0, words = counter_words(n);
  std::vector<Stages> stages;  // of a layer that a cluster has to itself: no tiles
  const std::vector<size_t> waves = waves_of(layers, element, device, way);
  for (size_t wave = 0; wave + 1 < waves.size(); ++wave) {
    const Total total(&layers[waves[wave]], layers.data() + waves[wave + 1], element, device, way == Way::keep);
    for (size_t j = waves[wave]; j < waves[wave + 1]; ++j) {
      const int pack = pack_of(layers[j], element);
      PlannedLayer planned = plan_layer(layers[j], element, total, device, pack, way, call);
      Room room(planned, call.update);
      if (pack > 1 && !planned.layer.gathered) {
        const PlannedLayer unaligned = plan_layer(layers[j], element, total, device, 1, way, call);
        const Room then(unaligned, call.update);
        room.shares = std::max(room.shares, then.shares);
        room.reduce_tiles = std::max(room.reduce_tiles, then.reduce_tiles);
        if (reinterpret_cast<uintptr_t>(layers[j].weight) % 16 != 0) planned = unaligned;
      }
      ForwardLayer& to = out[j] = planned.layer;
      plan.shared_bytes = std::max(plan.shared_bytes, uint32_t(planned.shared));
      if (to.keeps && !planned.is_whole) to.claims = uint32_t(words);
      if (!planned.is_whole) to.slots = uint32_t(slots / 4);
      to.sums = uint32_t(sums);
      words += room.claims;
      slots += room.shares;
      sums += room.reduce_tiles * kSums;
      stages.push_back(planned.is_whole ? Stages{} : stages_of(to, call, element));
    }
  }
  ForwardOrder order(stages, segments);
  plan.phase_first = way == Way::keep     ? order.emit_waves(waves, out)
                     : way == Way::phases ? order.emit_phases()
                                          : order.emit_one_launch(device.multiprocessors * kForwardBlocks);
  call.n_segments = order.n_segments();
  call.whole_layers = order.whole_layers();

  plan.counter_bytes = counter_bytes(words);
  const int64_t records_at = plan.counter_bytes, sums_at = records_at + n * int64_t(sizeof(Record));
  const int64_t slots_at = round_up(sums_at + sums * int64_t(sizeof(double)), 16);
  call.counters = nullptr;
  call.records = reinterpret_cast<Record*>(records_at);
  call.sums = reinterpret_cast<double*>(sums_at);
  call.slots = reinterpret_cast<float*>(slots_at);
  plan.workspace_bytes = slots_at + slots * int64_t(sizeof(float));
  plan_table<ForwardLayer>(plan, n, n * kPhases);
  return plan;
}

// What any forward call with these layers needs. The order of the layers counts, so it is the call's.
inline int64_t forward_workspace_bytes(const Geometry* geometry, int64_t n, DType weight_type, const Device& device,
                                       Way way) {
  const std::vector<Layer> layers = ordered_by_size(layers_without_memory(geometry, n));
  std::vector<ForwardLayer> planned(layers.size());
  std::vector<Segment> segments(layers.size() * kPhases);
  ForwardCall call = {};
  call.update = true;
  return plan_forward(layers, weight_type, device, way, call, planned.data(), segments.data()).workspace_bytes;
}

inline void set_workspace(ForwardCall& call, uintptr_t workspace) {
  add_address(call.counters, workspace);
  add_address(call.records, workspace);
  add_address(call.sums, workspace);
  add_address(call.slots, workspace);
}

// The launches of a forward call: those of the plan for each iteration, of which only the last writes the normalised
// weights. reset() zeroes the counters.
template <class Reset, class Launch>
int launch_forward(ForwardCall& call, const Plan& plan, int64_t iterations, Reset reset, Launch launch) {
  const int64_t passes = std::max(iterations, int64_t(1));
  for (int64_t pass = 0; pass < passes; ++pass) {
    call.write_output = pass + 1 == passes;
    const bool has_tickets = plan.phase_first.front() < plan.phase_first.back();
    if (const int error = has_tickets ? reset() : 0) return error;
    if (const int error = launch_phases(call, plan, launch)) return error;
  }
  return 0;
}

}  // namespace bssn::cuda
