// How a call is cut into tiles: sizes, tickets and workspace. Ordinary C++, run by the host for every call.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "reductions.h"

namespace bssn::cuda {

// Layers that are described by value, in the kernel arguments. These may be 4 KiB long, or 32764 bytes since CUDA 12.1,
// which takes longer to launch. The descriptions of more layers go to a table in the workspace: see TableChunk.
constexpr int kSmallCapacity = 21;
constexpr int kMaxByValue = 176;
constexpr int kMaxArgumentBytes = 32764;

// What a plan depends on besides the layers.
struct Device {
  int multiprocessors;
  int64_t shared_bytes;         // that one block can have
  int columns;                  // see kColumns: of packs, in the code that runs there
  bool has_clusters, can_keep;  // so do these
};

// The way that a call really takes.
inline Way way_on(const Device& device, Way way) {
  const bool cannot = (way == Way::clusters && !device.has_clusters) || (way == Way::keep && !device.can_keep);
  return cannot ? Way::tiles : way;
}

struct Plan {
  int64_t workspace_bytes;
  int64_t counter_bytes;  // at the start of the workspace, zero before a launch
  int64_t table_at;       // in the workspace: the layers, then the segments
  int64_t segments_at;
  uint32_t shared_bytes;
  std::vector<uint32_t> phase_first;  // the first ticket of each launch, and where the last one ends
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
inline int64_t counter_words(int64_t n) { return kPhases + 1 + n * kCounters; }
inline int64_t counter_bytes(int64_t words) { return round_up(words * int64_t(sizeof(uint32_t)), 16); }
inline int64_t element_size(DType type) { return type == DType::f32 ? 4 : 2; }

inline int64_t total_size(const std::vector<Layer>& layers) {
  int64_t total = 0;
  for (const Layer& layer : layers) total += layer.size();
  return total;
}

// The largest layers come first: what they make others wait for is then done while the others run.
inline std::vector<Layer> ordered_by_size(std::vector<Layer> layers) {
  std::stable_sort(layers.begin(), layers.end(), [](const Layer& a, const Layer& b) { return a.size() > b.size(); });
  return layers;
}

// The flat tiles of the phases that go through memory in order.
inline uint32_t flat_tile(int64_t total, const Device& device, int64_t largest) {
  return uint32_t(std::clamp(round_up(divide_up(total, 2 * device.multiprocessors), 2048), int64_t(4096), largest));
}

inline Layer with_geometry(const Geometry& geometry) {
  Layer layer = {};
  static_cast<Geometry&>(layer) = geometry;
  return layer;
}

// The layers of a call of which only the sizes matter.
inline std::vector<Layer> layers_without_memory(const Geometry* geometry, int64_t n) {
  std::vector<Layer> layers;
  layers.reserve(size_t(n));
  for (int64_t j = 0; j < n; ++j) layers.push_back(with_geometry(geometry[j]));
  return layers;
}

// The gains of those layers whose law is one, in their order.
inline void take_gains(std::vector<Layer>& layers, void* const* gains) {
  uint32_t taken = 0;
  for (Layer& layer : layers) {
    if (layer.law.kind != LawKind::gain) continue;
    layer.gain = static_cast<const float*>(gains[taken]);
    layer.grad_gain = taken++;
  }
}

inline LawNumber number_of(const Layer& layer) {
  LawNumber number;
  if (layer.law.kind == LawKind::gain) {
    number.gain = layer.gain;
  } else {
    number.constant = layer.law.number;
  }
  return number;
}

// Pointers of a forward call: n weights, n outputs, each layer's two or four vectors, then gains.
inline std::vector<Layer> forward_layers(const Geometry* geometry, int64_t n, void* const* pointers, float* snapshot,
                                         float* sigma, const Law* laws) {
  std::vector<Layer> layers = layers_without_memory(geometry, n);
  void* const* vector = pointers + 2 * n;
  for (int64_t j = 0; j < n; ++j) {
    Layer& layer = layers[size_t(j)];
    layer.weight = pointers[j];
    layer.output = pointers[n + j];
    for (int v = 0; v < (layer.two_sided ? 4 : 2); ++v) {
      layer.vectors[v] = static_cast<float*>(*vector++);
      layer.snapshot[v] = snapshot + layer.snapshot_offsets[v];
    }
    layer.sigma = sigma + j;
    layer.position = j;
    layer.law = laws[j];
  }
  take_gains(layers, vector);
  return ordered_by_size(std::move(layers));
}

// Of a backward call: n weights, n gradients, n outputs, n addresses of sigmas, then gains.
inline std::vector<Layer> backward_layers(const Geometry* geometry, int64_t n, void* const* pointers, float* snapshot,
                                          const Law* laws) {
  std::vector<Layer> layers = layers_without_memory(geometry, n);
  for (int64_t j = 0; j < n; ++j) {
    Layer& layer = layers[size_t(j)];
    layer.weight = pointers[j];
    layer.grad = pointers[n + j];
    layer.output = pointers[2 * n + j];
    layer.sigma = static_cast<float*>(pointers[3 * n + j]);
    layer.law = laws[j];
    for (int v = 0; v < (layer.two_sided ? 4 : 2); ++v) layer.snapshot[v] = snapshot + layer.snapshot_offsets[v];
  }
  take_gains(layers, pointers + 4 * n);
  return ordered_by_size(std::move(layers));
}

// Reserves room for the table of planned layers and segments behind the rest of the workspace, if they need one.
template <class Planned>
void plan_table(Plan& plan, int64_t n, int64_t n_segments) {
  plan.table_at = round_up(plan.workspace_bytes, 16);
  plan.segments_at = plan.table_at + n * int64_t(sizeof(Planned));
  if (n > kMaxByValue) plan.workspace_bytes = plan.segments_at + n_segments * int64_t(sizeof(Segment));
}

// A part of the table of layers or segments on its way to the device: the argument of a kernel that writes it there. As
// an argument it belongs to the launch, so that the replay of a captured graph needs nothing of the host's memory.
template <class Planned>
struct TableChunk {
  static constexpr int kCapacity = (kMaxArgumentBytes - 16) / int(sizeof(Planned));
  Planned* target;
  int32_t n;
  alignas(uint64_t) Planned planned[kCapacity];  // segments are aligned to half of it

  BSSN_HD void write(int thread, int threads) const {
    const uint64_t* const from = reinterpret_cast<const uint64_t*>(planned);
    uint64_t* const to = reinterpret_cast<uint64_t*>(target);
    static_assert(sizeof(Planned) % sizeof(uint64_t) == 0, "whole words");
    for (int x = thread; x < n * int(sizeof(Planned) / sizeof(uint64_t)); x += threads) to[x] = from[x];
  }
};

// Calls f(chunk) until all are on their way or f returns an error.
template <class Planned, class F>
int for_table_chunks(const Planned* planned, size_t n, Planned* table, F f) {
  TableChunk<Planned> chunk;
  for (size_t begin = 0; begin < n; begin += size_t(chunk.kCapacity)) {
    chunk.target = table + begin;
    chunk.n = int32_t(std::min(n - begin, size_t(chunk.kCapacity)));
    std::copy_n(planned + begin, chunk.n, chunk.planned);
    if (const int error = f(chunk)) return error;
  }
  return 0;
}

// Puts the workspace's address in place of the offset that the plan left.
template <class T>
void add_address(T*& pointer, uintptr_t workspace) {
  pointer = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(pointer) + workspace);
}

// Calls launch() for the tickets of each launch. Returns the first error.
template <class Call, class Launch>
int launch_phases(Call& call, const Plan& plan, Launch launch) {
  for (size_t phase = 0; phase + 1 < plan.phase_first.size(); ++phase) {
    call.first_ticket = plan.phase_first[phase];
    call.end_ticket = plan.phase_first[phase + 1];
    call.ticket_counter = uint32_t(phase);
    if (const int error = launch()) return error;
  }
  return 0;
}

}  // namespace bssn::cuda
