// What the backward kernel is told.
#pragma once

#include "forward_args.h"

namespace bssn::cuda {

// Weight, gradient and output of a layer lie in memory in the same dense order, whose dimension 0 is the one with
// stride 1. Two-sided if vectors[2] is not null.
struct BackwardLayer {
  const void* weight;
  const void* grad;
  void* output;
  const float* vectors[4];  // those of the forward
  const float* sigma;
  LawNumber number;
  uint32_t size;
  Divisor inner, plane;  // sizes of dimension 0, and of dimensions 0 and 1 together
  uint32_t middle;       // size of dimension 1
  uint32_t steps[4][3];  // how far one step along each dimension leads in each of the vectors
  uint32_t tiles;        // of each phase
  uint32_t sums;         // index of the first tile's sum
  uint32_t grad_gain;    // index of a gain's gradient
  uint8_t law;           // LawKind

  BSSN_HD bool two_sided() const { return vectors[2] != nullptr; }
  BSSN_HD bool slack() const { return is_slack(number, law, *sigma); }
};

constexpr int kBackwardPhases = 2;
constexpr int kBackwardThreads = 256;  // of a block; at most 80 registers each
constexpr int kBackwardBlocks = 3;     // on a multiprocessor at a time

struct BackwardRecord {
  float multiplier, ratio;  // dW = multiplier (G - ratio S)
};

struct BackwardCall {
  uint32_t* counters;  // as in ForwardCall, with the two phases dot and write
  BackwardRecord* records;
  double* sums;
  float* grad_gains;
  int32_t n_segments;
  int32_t grad_type;  // DType
  uint32_t tile_elements;
  uint32_t first_ticket, end_ticket;  // of this launch
  uint32_t ticket_counter;
};

template <int Capacity>
struct BackwardArgs {
  BackwardCall call;
  Segment segments[Capacity * kBackwardPhases];
  BackwardLayer layers[Capacity];
};

struct BackwardTableArgs {
  BackwardCall call;
  const Segment* segments;  // in device memory
  const BackwardLayer* layers;
};

}  // namespace bssn::cuda
