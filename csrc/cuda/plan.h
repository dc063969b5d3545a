// How a call is cut into tiles: sizes, tickets and workspace. Ordinary C++, run by the host for every call.
//
// The constants below have not been measured on a GPU yet; docs/performance-cuda.md says what they are expected to do.
#pragma once

#include <algorithm>

#include "backward_args.h"
#include "reductions.h"

namespace bssn::cuda {

// Kernel arguments may be 4 KiB long, or 32764 bytes since CUDA 12.1: the longer ones take longer to launch.
constexpr int kSmallCapacity = 24;
constexpr int kMaxLayers = 200;

// What a plan depends on besides the layers.
struct Device {
  int multiprocessors;
  int64_t shared_bytes;  // that one block can have
};

struct Plan {
  int64_t workspace_bytes;
  int64_t counter_bytes;  // at the start of the workspace, zero before a launch
  uint32_t shared_bytes;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
inline int64_t counter_bytes(int n) { return round_up((kPhases + 1 + n * kCounters) * int64_t(sizeof(uint32_t)), 16); }
inline int64_t element_size(DType type) { return type == DType::f32 ? 4 : 2; }

inline int64_t total_size(const Layer* layers, int n) {
  int64_t total = 0;
  for (int j = 0; j < n; ++j) total += layers[j].size();
  return total;
}

// The largest layers come first: what they make others wait for is then done while the others run.
inline void order_by_size(const Layer* layers, int n, int* order) {
  for (int j = 0; j < n; ++j) order[j] = j;
  std::sort(order, order + n, [&](int a, int b) {
    return layers[a].size() != layers[b].size() ? layers[a].size() > layers[b].size() : a < b;
  });
}

// The flat tiles of the phases that go through memory in order.
inline uint32_t flat_tile(int64_t total, const Device& device, int64_t largest) {
  return uint32_t(std::clamp(round_up(divide_up(total, 2 * device.multiprocessors), 2048), int64_t(4096), largest));
}

struct Strides {
  int64_t out, in, kernel;
};

// Strides in elements. The offsets of a strided layer's kernel positions are equally spaced: Python copies others.
inline Strides strides_of(const Layer& layer) {
  if (layer.order == Order::channel_major) return {layer.columns(), layer.kernel, 1};
  if (layer.order == Order::kernel_major) return {layer.columns(), 1, layer.c_in};
  return {layer.stride_out, layer.stride_in, layer.kernel > 1 ? layer.kernel_offsets[1] - layer.kernel_offsets[0] : 1};
}

// Output channels of a power tile. Each tile writes a share of t and r that is read again, so few large tiles move
// less; two tiles for each multiprocessor even out better than one.
inline int64_t channels_per_tile(const Layer& layer, int64_t total, const Device& device) {
  const double share = double(layer.size()) / double(total) * device.multiprocessors;
  const auto channels = [&](double tiles) { return int64_t(std::ceil(double(layer.c_out) / std::max(tiles, 1.0))); };
  constexpr int64_t kEnough = 16;
  return channels(2 * share) >= kEnough ? channels(2 * share) : std::min(channels(share), kEnough);
}

// Chooses how many threads share a row, and how many steps of rows lie in shared memory; leaves stage_bytes 0 if the
// rows cannot be staged. Returns the shared memory that the layer needs.
inline int64_t plan_stages(const Layer& layer, int64_t element, int64_t channels, const Device& device,
                           ForwardLayer& out) {
  out.group_log2 = kThreadsLog2;
  out.stages = 0;
  out.stage_bytes = 0;
  if (layer.order == Order::strided) return kMinShared;  // rows do not follow each other in memory
  const int64_t u_in = layer.two_sided ? round_up(4 * layer.c_in, 16) : 0;
  for (int log2 = 5; log2 <= kThreadsLog2; ++log2) {
    const int64_t threads = int64_t(1) << log2, groups = kThreads / threads;
    const bool has_lanes = layer.kernel <= threads && threads / layer.kernel * kColumns >= layer.c_in;
    if (!has_lanes || (groups > channels && log2 < kThreadsLog2)) continue;
    const int64_t stage = round_up(groups * layer.columns() * element + 16, 16);
    const int64_t steps = divide_up(channels, groups), room = device.shared_bytes - kAreaAt;
    const int64_t stages = std::min({(room - u_in) / stage, steps, int64_t(kMaxStages)});
    const int64_t table = 4 * groups * layer.columns();
    const bool may_improve = log2 < kThreadsLog2 && steps > 1 && stages < 2;
    if (stages < 1 || table > room || may_improve) continue;
    out.group_log2 = uint8_t(log2);
    out.stages = uint8_t(stages);
    out.stage_bytes = uint32_t(stage);
    return std::max({int64_t(kMinShared), kAreaAt + u_in + stages * stage, kAreaAt + table});
  }
  return kMinShared;
}

// Fills in `call` and `out` but for the workspace's address (offsets stand in its place) and what is not the plan's.
inline Plan plan_forward(const Layer* layers, int n, DType weight_type, const Device& device, ForwardCall& call,
                         ForwardLayer* out) {
  const int64_t total = total_size(layers, n);
  int order[kMaxLayers];
  order_by_size(layers, n, order);
  Plan plan = {0, counter_bytes(n), kMinShared};
  call.n_layers = n;
  call.write_elements = flat_tile(total, device, 32768);
  int64_t sums = 0, slots = 0;
  for (int j = 0; j < n; ++j) {
    const Layer& layer = layers[order[j]];
    ForwardLayer& to = out[j];
    to.weight = layer.weight;
    to.output = layer.output;
    for (int v = 0; v < 4; ++v) {
      to.vectors[v] = static_cast<float*>(layer.vectors[v]);
      to.snapshot[v] = static_cast<float*>(layer.snapshot[v]);
    }
    to.sigma = static_cast<float*>(layer.sigma);
    to.c_out = int32_t(layer.c_out);
    to.c_in = int32_t(layer.c_in);
    to.kernel = int32_t(layer.kernel);
    to.kernel_major = layer.order == Order::kernel_major;
    const Strides strides = strides_of(layer);
    to.stride_out = int32_t(strides.out);
    to.stride_in = int32_t(strides.in);
    to.stride_kernel = int32_t(strides.kernel);

    int64_t channels = channels_per_tile(layer, total, device);
    plan.shared_bytes =
        std::max(plan.shared_bytes, uint32_t(plan_stages(layer, element_size(weight_type), channels, device, to)));
    if (to.stage_bytes) channels = round_up(channels, kThreads >> to.group_log2);
    to.channels = int32_t(std::min(channels, layer.c_out));
    to.tiles[power] = uint32_t(divide_up(layer.c_out, to.channels));
    to.slices_log2 = 0;
    while (to.slices_log2 < 4 && to.tiles[power] >> to.slices_log2 > 16) ++to.slices_log2;
    const int64_t reduced = call.update ? layer.columns() + (layer.two_sided ? layer.c_in : 0) : 0;
    to.tiles[reduce] = uint32_t(std::max(divide_up(reduced, kThreads >> to.slices_log2), int64_t(1)));
    to.tiles[write] = uint32_t(divide_up(layer.size(), call.write_elements));
    to.slots = uint32_t(slots / 4);
    to.sums = uint32_t(sums);
    if (call.update) slots += int64_t(to.tiles[power]) * to.slot_size();
    sums += int64_t(to.tiles[power]) * kPowerSums + int64_t(to.tiles[reduce]) * kReduceSums;
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
  return plan;
}

// Describes how a layer's memory order leads through its vectors.
inline void plan_memory_order(const Layer& layer, BackwardLayer& out) {
  struct Dimension {
    int64_t size, stride;
    uint32_t steps[4];  // in u_out [o], v_out [i, k], u_in [i], v_in [o, k]
  };
  const Strides strides = strides_of(layer);
  const uint32_t kernel = uint32_t(layer.kernel);
  Dimension dimensions[3] = {{layer.c_out, strides.out, {1, 0, 0, kernel}},
                             {layer.c_in, strides.in, {0, kernel, 1, 0}},
                             {layer.kernel, strides.kernel, {0, 1, 0, 1}}};
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

inline Plan plan_backward(const Layer* layers, int n, const Device& device, BackwardCall& call, BackwardLayer* out) {
  const int64_t total = total_size(layers, n);
  int order[kMaxLayers];
  order_by_size(layers, n, order);
  Plan plan = {0, counter_bytes(n), kMinShared};
  call.n_layers = n;
  call.tile_elements = flat_tile(total, device, 16384);
  uint32_t tiles = 0;
  for (int j = 0; j < n; ++j) {
    const Layer& layer = layers[order[j]];
    BackwardLayer& to = out[j];
    to.weight = layer.weight;
    to.grad = layer.grad;
    to.output = layer.output;
    for (int v = 0; v < 4; ++v) to.vectors[v] = static_cast<const float*>(layer.snapshot[v]);
    to.sigma = static_cast<const float*>(layer.sigma);
    to.size = uint32_t(layer.size());
    plan_memory_order(layer, to);
    to.tiles = uint32_t(divide_up(layer.size(), call.tile_elements));
    to.sums = to.first[0] = tiles;
    tiles += to.tiles;
  }
  for (int j = 0; j < n; ++j) out[j].first[1] = tiles + out[j].first[0];
  for (int phase = 0; phase <= kBackwardPhases; ++phase) call.phase_first[phase] = tiles * uint32_t(phase);

  const int64_t records_at = plan.counter_bytes;
  const int64_t sums_at = records_at + n * int64_t(sizeof(BackwardRecord));
  call.counters = nullptr;
  call.records = reinterpret_cast<BackwardRecord*>(records_at);
  call.sums = reinterpret_cast<double*>(sums_at);
  plan.workspace_bytes = sums_at + tiles * int64_t(sizeof(double));
  return plan;
}

// Puts the workspace's address in place of the offset that the plan left.
template <class T>
void add_address(T*& pointer, uintptr_t workspace) {
  pointer = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(pointer) + workspace);
}

inline void set_workspace(ForwardCall& call, uintptr_t workspace) {
  add_address(call.counters, workspace);
  add_address(call.records, workspace);
  add_address(call.sums, workspace);
  add_address(call.slots, workspace);
}

inline void set_workspace(BackwardCall& call, uintptr_t workspace) {
  add_address(call.counters, workspace);
  add_address(call.records, workspace);
  add_address(call.sums, workspace);
}

// Calls launch() with the tickets of all phases at once, or phase after phase. Returns the first error.
template <class Call, class Launch>
int launch_phases(Call& call, int phases, bool one_launch, Launch launch) {
  for (int phase = 0; phase < (one_launch ? 1 : phases); ++phase) {
    call.first_ticket = call.phase_first[phase];
    call.end_ticket = call.phase_first[one_launch ? phases : phase + 1];
    call.ticket_counter = uint32_t(phase);
    if (const int error = launch()) return error;
  }
  return 0;
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
