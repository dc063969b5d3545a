// How a forward call is cut into tiles.
#pragma once

#include "plan.h"
#include "power.h"

namespace bssn::cuda {

// Output channels of a power tile. Each tile writes a share of t and r that is read again, so few large tiles move
// less; two tiles for each multiprocessor even out better than one.
inline int64_t channels_per_tile(const Layer& layer, int64_t total, const Device& device) {
  const double share = double(layer.size()) / double(total) * device.multiprocessors;
  const auto channels = [&](double tiles) { return int64_t(std::ceil(double(layer.c_out) / std::max(tiles, 1.0))); };
  constexpr int64_t kEnough = 16, kFewestElements = 8192;
  const int64_t wanted = channels(2 * share) >= kEnough ? channels(2 * share) : std::min(channels(share), kEnough);
  return std::min(std::max(wanted, divide_up(kFewestElements, layer.columns())), layer.c_out);
}

// Of a power of two.
inline int log2(int64_t x) { return x == 1 ? 0 : 1 + log2(x / 2); }

// Elements of a row that a thread takes at a time, where the weight itself begins at a multiple of 16 bytes.
inline int pack_of(const Layer& layer, int64_t element) {
  const bool rows_begin_there = layer.columns() * element % 16 == 0;
  return rows_begin_there && (layer.channel_major() || layer.c_in % kMaxPack == 0) ? kMaxPack : 1;
}

// Chooses how many threads share a row, and how many steps of rows lie in shared memory; leaves stage_bytes 0 if the
// rows cannot be staged. Returns the shared memory that the layer needs.
inline int64_t plan_stages(const Layer& layer, int64_t element, int64_t channels, const Device& device, int pack,
                           ForwardLayer& out) {
  const auto walk = [&](int64_t threads) { return Walk(int(threads), int(layer.kernel), layer.kernel_major(), pack); };
  const auto share_rows = [&](int64_t threads) {
    out.group_shift = uint8_t(log2(threads));
    out.groups = uint8_t(kThreads / threads);
    out.stride = uint16_t(walk(threads).stride);
    const int64_t parts = std::max(int64_t(kSumParts), divide_up(walk(threads).same_k, Lane::kMaxTerms));
    out.q_parts = uint8_t(std::min(threads / layer.kernel, parts));
  };
  share_rows(kThreads);
  out.packed = pack > 1;
  out.stages = 0;
  out.stage_bytes = 0;
  if (!layer.channel_major() && !layer.kernel_major()) return kMinShared;
  const int64_t length = layer.kernel_major() ? layer.c_in : layer.columns();
  const int most = pack == 1 ? kFewColumns : device.columns;
  for (const int64_t threads : {32, 64, 128, 256, kThreads}) {
    const int64_t groups = kThreads / threads, stride = walk(threads).stride;
    const bool is_last = groups == 1;
    if (layer.kernel > threads || stride == 0 || (groups > channels && !is_last)) continue;
    const int64_t columns = divide_up(length, stride) * pack;  // of one thread
    if (columns > most) continue;
    out.more_v = columns > kFewColumns;
    const int64_t vectors = out.u_bytes() + out.v_bytes(), room = device.shared_bytes - kAreaAt;
    const int64_t stage = round_up(groups * layer.columns() * element + 16, 16), steps = divide_up(channels, groups);
    const int64_t stages = std::min({(room - vectors) / stage, steps, int64_t(kMaxStages)});
    const int64_t table = 4 * groups * layer.columns();
    const bool may_improve = !is_last && steps > 1 && stages < 2;
    if (stages < 1 || table > room || may_improve) continue;
    share_rows(threads);
    out.stages = uint8_t(stages);
    out.stage_bytes = uint32_t(stage);
    return std::max({int64_t(kMinShared), kAreaAt + vectors + stages * stage, kAreaAt + table});
  }
  return kMinShared;
}

// Fills in `call` and `out` but for the workspace's address (offsets stand in its place) and what is not the plan's.
// out: one for each layer, in the order of `layers`, of which the largest comes first.
inline Plan plan_forward(const std::vector<Layer>& layers, DType weight_type, const Device& device, ForwardCall& call,
                         ForwardLayer* out) {
  const int64_t total = total_size(layers);
  const int n = int(layers.size());
  Plan plan = {0, counter_bytes(n), 0, kMinShared};
  call.n_layers = n;
  call.write_elements = flat_tile(total, device, 32768);
  int64_t sums = 0, slots = 0;
  for (int j = 0; j < n; ++j) {
    const Layer& layer = layers[size_t(j)];
    ForwardLayer& to = out[j];
    to.weight = layer.weight;
    to.output = layer.output;
    for (int v = 0; v < 4; ++v) {
      to.vectors[v] = layer.vectors[v];
      to.snapshot[v] = layer.snapshot[v];
    }
    to.sigma = layer.sigma;
    to.c_out = int32_t(layer.c_out);
    to.c_in = int32_t(layer.c_in);
    to.kernel = int32_t(layer.kernel);
    to.both_sides = layer.two_sided != 0;
    to.kernel_major = layer.kernel_major();
    to.stride_out = int32_t(layer.stride_out);
    to.stride_in = int32_t(layer.stride_in);
    to.stride_kernel = int32_t(layer.stride_kernel);

    const int64_t element = element_size(weight_type);
    int64_t channels = channels_per_tile(layer, total, device), shared;
    const int pack = pack_of(layer, element);
    shared = plan_stages(layer, element, channels, device, pack, to);
    const int64_t groups = to.groups;
    channels = std::max((channels + groups / 2) / groups, int64_t(1)) * groups;
    // Tiles and workspace must not depend on where the weight lies.
    if (pack > 1 && reinterpret_cast<uintptr_t>(layer.weight) % 16 != 0) {
      shared = plan_stages(layer, element, channels, device, 1, to);
    }
    plan.shared_bytes = std::max(plan.shared_bytes, uint32_t(shared));
    to.channels = int32_t(std::min(channels, layer.c_out));
    to.tiles[power] = uint32_t(divide_up(layer.c_out, to.channels));
    to.slices = 4;
    while (to.slices < 16 && to.tiles[power] / to.slices > 8) to.slices *= 2;
    const int64_t reduced = call.update ? layer.columns() + (layer.two_sided ? layer.c_in : 0) : 0;
    to.tiles[reduce] = to.first_tiles() + uint32_t(divide_up(reduced, 4 * kThreads / to.slices));
    to.tiles[write] = uint32_t(divide_up(layer.size(), call.write_elements));
    to.slots = uint32_t(slots / 4);
    to.sums = uint32_t(sums);
    if (call.update) slots += int64_t(to.tiles[power]) * to.slot_size();
    sums += int64_t(to.tiles[reduce]) * kSums;
  }
  uint32_t ticket = 0;
  for (int phase = 0; phase < kPhases; ++phase) {
    call.phase_first[phase] = ticket;
    for (int j = 0; j < n; ++j) {
      out[j].first[phase] = ticket;
      ticket += out[j].tiles[phase];
    }
  }
  call.phase_first[kPhases] = ticket;

  const int64_t records_at = plan.counter_bytes, sums_at = records_at + n * int64_t(sizeof(Record));
  const int64_t slots_at = round_up(sums_at + sums * int64_t(sizeof(double)), 16);
  call.counters = nullptr;
  call.records = reinterpret_cast<Record*>(records_at);
  call.sums = reinterpret_cast<double*>(sums_at);
  call.slots = reinterpret_cast<float*>(slots_at);
  plan.workspace_bytes = slots_at + slots * int64_t(sizeof(float));
  plan_table<ForwardLayer>(plan, layers.size());
  return plan;
}

inline void set_workspace(ForwardCall& call, uintptr_t workspace) {
  add_address(call.counters, workspace);
  add_address(call.records, workspace);
  add_address(call.sums, workspace);
  add_address(call.slots, workspace);
}

// The launches of a forward call: one for each iteration, of which only the last writes the normalised weights.
// reset() zeroes the counters.
template <class Reset, class Launch>
int launch_forward(ForwardCall& call, int64_t iterations, bool one_launch, Reset reset, Launch launch) {
  const int64_t passes = std::max(iterations, int64_t(1));
  for (int64_t pass = 0; pass < passes; ++pass) {
    call.write_output = pass + 1 == passes;
    if (const int error = reset()) return error;
    if (const int error = launch_phases(call, kPhases, one_launch, launch)) return error;
  }
  return 0;
}

}  // namespace bssn::cuda
