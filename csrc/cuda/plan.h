// How a call is cut into tiles: sizes, tickets and workspace. Ordinary C++, run by the host for every call.
//
// The constants below have not been measured on a GPU yet; docs/performance-cuda.md says what they are expected to do.
#pragma once

#include <algorithm>

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

inline Layer with_geometry(const Geometry& geometry) {
  Layer layer = {};
  static_cast<Geometry&>(layer) = geometry;
  return layer;
}

// Calls f with at most kMaxLayers layers at a time: f(layers, count), until it returns an error. Pointers of a forward
// call: n weights, n outputs, then each layer's two or four vectors.
template <class F>
int for_forward_layers(const Geometry* geometry, int64_t n, void* const* pointers, float* snapshot, float* sigma, F f) {
  Layer layers[kMaxLayers];
  void* const* vector = pointers + 2 * n;
  for (int64_t begin = 0; begin < n; begin += kMaxLayers) {
    const int count = int(std::min(n - begin, int64_t(kMaxLayers)));
    for (int64_t j = begin; j < begin + count; ++j) {
      Layer& layer = layers[j - begin] = with_geometry(geometry[j]);
      layer.weight = pointers[j];
      layer.output = pointers[n + j];
      for (int v = 0; v < (layer.two_sided ? 4 : 2); ++v) {
        layer.vectors[v] = static_cast<float*>(*vector++);
        layer.snapshot[v] = snapshot + layer.snapshot_offsets[v];
      }
      layer.sigma = sigma + j;
    }
    if (const int error = f(layers, count)) return error;
  }
  return 0;
}

// The same for a backward call: n weights, n gradients, n outputs, n addresses of sigmas.
template <class F>
int for_backward_layers(const Geometry* geometry, int64_t n, void* const* pointers, float* snapshot, F f) {
  Layer layers[kMaxLayers];
  for (int64_t begin = 0; begin < n; begin += kMaxLayers) {
    const int count = int(std::min(n - begin, int64_t(kMaxLayers)));
    for (int64_t j = begin; j < begin + count; ++j) {
      Layer& layer = layers[j - begin] = with_geometry(geometry[j]);
      layer.weight = pointers[j];
      layer.grad = pointers[n + j];
      layer.output = pointers[2 * n + j];
      layer.sigma = static_cast<float*>(pointers[3 * n + j]);
      for (int v = 0; v < (layer.two_sided ? 4 : 2); ++v) layer.snapshot[v] = snapshot + layer.snapshot_offsets[v];
    }
    if (const int error = f(layers, count)) return error;
  }
  return 0;
}

// Bytes of workspace that a call needs: plan(layers, count) for the part that needs most.
template <class MakePlan>
int64_t largest_workspace(const Geometry* geometry, int64_t n, MakePlan plan) {
  Layer layers[kMaxLayers];
  int64_t bytes = 0;
  for (int64_t begin = 0; begin < n; begin += kMaxLayers) {
    const int count = int(std::min(n - begin, int64_t(kMaxLayers)));
    for (int j = 0; j < count; ++j) layers[j] = with_geometry(geometry[begin + j]);
    bytes = std::max(bytes, plan(layers, count).workspace_bytes);
  }
  return bytes;
}

// Puts the workspace's address in place of the offset that the plan left.
template <class T>
void add_address(T*& pointer, uintptr_t workspace) {
  pointer = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(pointer) + workspace);
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

}  // namespace bssn::cuda
