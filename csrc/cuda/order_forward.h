// In which order a forward call's tiles are handed out.
#pragma once

#include <array>
#include <functional>
#include <limits>
#include <queue>
#include <tuple>

#include "plan.h"

namespace bssn::cuda {

// What a layer has in one phase: tiles, and how much memory each of them moves, in any unit.
struct Stage {
  uint32_t tiles;
  double work;
};
using Stages = std::array<Stage, kPhases>;

class ForwardOrder {
 public:
  // Of a layer that a cluster has to itself, all stages are empty.
  ForwardOrder(const std::vector<Stages>& stages, Segment* segments) : stages_(stages), begin_(segments) {
    for (uint32_t j = 0; j < stages.size(); ++j) {
      if (is_whole(j)) begin_[segments_++] = Segment::of(ticket_++, j, whole);
    }
    whole_layers_ = ticket_;
  }

  // These return where the launches begin, and where the last one ends.
  //
  // A layer's next phase follows the one before at such a distance that the last tiles of that one will have been
  // finished, while all blocks together move `kLag` times what they move during one of these tiles. No sooner, or
  // blocks would wait; no later, or the weights would have left the cache.
  std::vector<uint32_t> emit_one_launch(int blocks) {
    for (uint32_t j = 0; j < stages_.size(); ++j) {
      emit_with_next(j, power, blocks);
      emit_due(position_, blocks);
    }
    emit_due(std::numeric_limits<double>::infinity(), blocks);
    return {whole_layers_, ticket_};
  }

  std::vector<uint32_t> emit_phases() {
    std::vector<uint32_t> firsts;
    for (const Phase phase : {power, reduce, write}) {
      firsts.push_back(ticket_);
      for (uint32_t j = 0; j < stages_.size(); ++j) emit(j, phase);
    }
    firsts.push_back(ticket_);
    return firsts;
  }

  // Where rows are kept: a wave's power tiles are all at work at the same time, and what blocks write while they wait
  // for the record of what they keep is the rest of the wave before. waves: where they begin, and the end.
  std::vector<uint32_t> emit_waves(const std::vector<size_t>& waves, ForwardLayer* layers) {
    for (size_t wave = 0; wave + 1 < waves.size(); ++wave) {
      for (size_t j = waves[wave]; j < waves[wave + 1]; ++j) emit(uint32_t(j), power);
      for (size_t j = waves[wave]; j < waves[wave + 1]; ++j) {
        emit(uint32_t(j), reduce);
        if (layers[j].keeps) layers[j].reduced_by = ticket_;
      }
      if (wave > 0) emit_writes(waves[wave - 1], waves[wave]);
    }
    if (waves.size() > 1) emit_writes(waves[waves.size() - 2], waves.back());
    return {0, ticket_};
  }

  uint32_t whole_layers() const { return whole_layers_; }
  int32_t n_segments() const { return int32_t(segments_); }

 private:
  static constexpr double kLag = 1.5;

  struct Due {
    double position;
    uint32_t phase, layer;
    bool operator>(const Due& other) const {
      return std::tie(position, phase, layer) > std::tie(other.position, other.phase, other.layer);
    }
  };

  bool is_whole(uint32_t layer) const { return stages_[layer][power].tiles == 0; }

  void emit(uint32_t layer, uint32_t phase) {
    if (is_whole(layer)) return;
    const Stage& stage = stages_[layer][phase];
    begin_[segments_++] = Segment::of(ticket_, layer, phase);
    ticket_ += stage.tiles;
    position_ += stage.tiles * stage.work;
  }

  void emit_writes(size_t begin, size_t end) {
    for (size_t j = begin; j < end; ++j) emit(uint32_t(j), write);
  }

  void emit_with_next(uint32_t layer, uint32_t phase, int blocks) {
    emit(layer, phase);
    if (!is_whole(layer) && phase != write) {
      due_.push({position_ + kLag * blocks * stages_[layer][phase].work, phase + 1, layer});
    }
  }

  void emit_due(double until, int blocks) {
    while (!due_.empty() && due_.top().position <= until) {
      const Due next = due_.top();
      due_.pop();
      emit_with_next(next.layer, next.phase, blocks);
    }
  }

  const std::vector<Stages>& stages_;
  Segment* begin_;
  std::priority_queue<Due, std::vector<Due>, std::greater<Due>> due_;
  uint32_t segments_ = 0, ticket_ = 0, whole_layers_ = 0;
  double position_ = 0;
};

}  // namespace bssn::cuda
