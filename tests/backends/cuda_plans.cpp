// How calls are cut into tiles, for tests of the plans alone.
#include <algorithm>
#include <vector>

#include "cuda/plan_backward.h"
#include "cuda/plan_forward.h"
#include "cuda_limits.h"

using namespace bssn::cuda;

extern "C" {

// Of each layer of a forward call: power tiles, their channels, bytes of a step in shared memory (0: the
// rows are read from global memory), steps in shared memory at a time, threads that share a row, chunks of a row,
// reduce tiles, those that add up s and q, how many numbers these add up, how its rows are taken, write tiles, whether
// rows are kept, steps of them that are lost.
void plan_of(const Geometry* geometry, int n, DType weight_type, Way way, int multiprocessors, int64_t shared,
             int64_t* out) {
  std::vector<Layer> layers;
  for (int j = 0; j < n; ++j) {
    layers.push_back(with_geometry(geometry[j]));
    layers.back().weight = reinterpret_cast<const void*>(uintptr_t(j) * 256);  // to know it again: the plan is sorted
  }
  layers = ordered_by_size(layers);
  ForwardCall call = {};
  std::vector<ForwardLayer> planned(layers.size());
  std::vector<Segment> segments(layers.size() * kPhases);
  call.update = true;
  plan_forward(layers, weight_type, device_of(multiprocessors, shared), way, call, planned.data(), segments.data());
  for (const ForwardLayer& layer : planned) {
    int64_t elements = 0;
    for (uint32_t tile = 0; tile < layer.first_tiles(); ++tile) {
      elements += int64_t(layer.firsts_of(tile).end) - layer.firsts_of(tile).first;
    }
    const int64_t found[] = {
        layer.tiles[power], layer.channels,      layer.stage_bytes,   layer.stages, layer.group_threads(),
        layer.chunks(),     layer.tiles[reduce], layer.first_tiles(), elements,     layer.rows,
        layer.tiles[write], layer.keeps,         layer.lost_stages};
    std::copy(std::begin(found), std::end(found), out + 13 * (reinterpret_cast<uintptr_t>(layer.weight) / 256));
  }
}

// The segments of a forward call: three numbers for each, layer, phase and first ticket; then the end. Returns how many
// segments there are.
int order_of(const Geometry* geometry, int n, DType weight_type, Way way, int multiprocessors, int64_t shared,
             int64_t* out) {
  std::vector<Layer> layers = layers_without_memory(geometry, n);
  std::vector<ForwardLayer> planned(layers.size());
  std::vector<Segment> segments(layers.size() * kPhases);
  ForwardCall call = {};
  call.update = true;
  const Device device = device_of(multiprocessors, shared);
  const Plan plan = plan_forward(layers, weight_type, device, way, call, planned.data(), segments.data());
  for (int x = 0; x < call.n_segments; ++x) {
    *out++ = segments[size_t(x)].layer();
    *out++ = segments[size_t(x)].phase();
    *out++ = segments[size_t(x)].first;
  }
  *out = plan.phase_first.back();
  return call.n_segments;
}

// Of each layer of a backward call: <G, W> tiles, dW tiles, and if dW is written by rows the tiles beside each other,
// their pieces, rows and rows at a time (else 0), and the steps that are kept. Then the segments of one launch: layer,
// kind and first ticket; then the end. Returns how many segments there are.
int backward_plan_of(const Geometry* geometry, int n, DType grad_type, Way way, int multiprocessors, int64_t shared,
                     int64_t* out) {
  const std::vector<Layer> layers = layers_without_memory(geometry, n);
  std::vector<BackwardLayer> planned(layers.size());
  std::vector<Segment> segments(layers.size() * kBackwardSegments);
  BackwardCall call = {};
  const Device device = device_of(multiprocessors, shared);
  const Plan plan = plan_backward(layers, grad_type, device, way, call, planned.data(), segments.data());
  for (const BackwardLayer& layer : planned) {
    const RowTiles& rows = layer.rows;
    const int64_t found[] = {layer.dot_tiles, layer.write_tiles, rows.column_blocks, rows.width,
                             rows.tile_rows,  rows.rows_at_once, layer.kept_steps};
    out = std::copy(std::begin(found), std::end(found), out);
  }
  for (int x = 0; x < call.n_segments; ++x) {
    *out++ = segments[size_t(x)].layer();
    *out++ = segments[size_t(x)].phase();
    *out++ = segments[size_t(x)].first;
  }
  *out = plan.phase_first.back();
  return call.n_segments;
}
}
