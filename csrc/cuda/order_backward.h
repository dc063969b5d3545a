// In which order a backward call's tiles are handed out.
#pragma once

#include <limits>
#include <queue>

#include "backward_args.h"
#include "plan.h"

namespace bssn::cuda {

// G is read twice, for <G, W> and for dW, and what was read last can be in the cache still. So a layer's dW is written
// as soon as its <G, W> is there, and from its end. Until it is there all blocks together finish the tile that each of
// them has in hand and take about one more: the first tiles of the next layer. The rest of them, if any, comes behind
// dW.
//
// On an H200 with its 396 blocks such a distance is 16 MB of G, of 60 MB that the cache holds. Large layers have 38 or
// 85 MB: with all of the next layer in between, nothing would be left.
class BackwardOrder {
 public:
  BackwardOrder(BackwardLayer* layers, uint32_t n, uint32_t tile_elements, int blocks, Segment* segments)
      : layers_(layers), n_(n), tile_(tile_elements), distance_(kLag * blocks * tile_elements), begin_(segments) {}

  // Returns where the launches begin, and where the last one ends.
  std::vector<uint32_t> emit_one_launch() {
    for (uint32_t j = 0; j < n_; ++j) {
      const double rest = emit_dots(j);
      emit_due(position_);
      if (rest > 0) {
        emit(j, dot_rest, layers_[j].dot_tiles - layers_[j].first_dot_tiles, rest);
        emit_due(position_);
      }
      due_.push({position_ + distance_, j});
    }
    emit_due(std::numeric_limits<double>::infinity());
    return {0, ticket_};
  }

  std::vector<uint32_t> emit_phases() {
    for (uint32_t j = 0; j < n_; ++j) {
      layers_[j].first_dot_tiles = layers_[j].dot_tiles;
      emit(j, dot, layers_[j].dot_tiles, layers_[j].size);
    }
    const uint32_t dots_end = ticket_;
    emit_gradients(0, n_);
    return {0, dots_end, ticket_};
  }

  // Where G is kept: a wave's tiles that do so are all at work at the same time, and what blocks write while they wait
  // for the record of what they keep is the rest of the wave before. Tiles of layers that are not kept come last, as no
  // block is to have two others. waves: where they begin, and the end.
  std::vector<uint32_t> emit_waves(const std::vector<uint32_t>& waves) {
    for (size_t wave = 0; wave + 1 < waves.size(); ++wave) {
      for (const bool keeps : {true, false}) {
        for (uint32_t j = waves[wave]; j < waves[wave + 1]; ++j) {
          BackwardLayer& layer = layers_[j];
          if (layer.keeps() != keeps) continue;
          emit(j, dot, layer.dot_tiles, layer.size);
          if (keeps) layer.summed_by = ticket_;
        }
      }
      if (wave > 0) emit_gradients(waves[wave - 1], waves[wave]);
    }
    emit_gradients(waves[waves.size() - 2], waves.back());
    return {0, ticket_};
  }

  int32_t n_segments() const { return int32_t(segments_); }

 private:
  static constexpr double kLag = 1.25;

  struct Due {
    double position;
    uint32_t layer;
  };

  void emit(uint32_t layer, BackwardSegment kind, uint32_t tiles, double elements) {
    begin_[segments_++] = Segment::of(ticket_, layer, uint32_t(kind));
    ticket_ += tiles;
    position_ += elements;
  }

  void emit_gradients(uint32_t begin, uint32_t end) {
    for (uint32_t j = begin; j < end; ++j) emit(j, subtract, layers_[j].write_tiles, layers_[j].size);
  }

  // The first tiles of a layer: as many as come before the last dW that is due within it. Returns how many elements
  // are left.
  double emit_dots(uint32_t j) {
    BackwardLayer& layer = layers_[j];
    layer.first_dot_tiles = layer.dot_tiles;
    if (!due_.empty() && due_.back().position < position_ + layer.size) {
      const double until = std::max(0.0, due_.back().position - position_);
      layer.first_dot_tiles = std::min(layer.dot_tiles, uint32_t(until / tile_) + 1);
    }
    const double elements = std::min(double(layer.size), double(layer.first_dot_tiles) * tile_);
    emit(j, dot, layer.first_dot_tiles, elements);
    return layer.size - elements;
  }

  void emit_due(double until) {
    while (!due_.empty() && due_.front().position <= until) {
      const uint32_t layer = due_.front().layer;
      due_.pop();
      emit(layer, subtract, layers_[layer].write_tiles, layers_[layer].size);
    }
  }

  BackwardLayer* layers_;
  uint32_t n_, tile_;
  double distance_;
  Segment* begin_;
  std::queue<Due> due_;  // the layers' gradients in the order in which they can be written
  uint32_t segments_ = 0, ticket_ = 0;
  double position_ = 0;  // in elements that are read
};

}  // namespace bssn::cuda
