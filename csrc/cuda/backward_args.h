// What the backward kernel is told.
#pragma once

#include "forward_args.h"

namespace bssn::cuda {

constexpr int kBackwardPiece = 4;  // elements that a thread loads at a time

// What the tiles of a segment do: add up <G, W>, in two segments at most, or write dW.
enum BackwardSegment : int { dot = 0, dot_rest = 1, subtract = 2, kBackwardSegments = 3 };

// How the gradient of a layer whose memory is a list of rows is cut into tiles: see backward_rows.h.
struct RowTiles {
  uint32_t column_blocks;  // tiles beside each other; 0: the layer's gradient is written in flat tiles
  uint32_t tile_rows;
  uint16_t width;         // of a tile, in pieces
  uint16_t rows_at_once;  // that a block's threads take at a time
};

constexpr uint8_t kKernelStep = 2;  // stands for a step of as many elements as there are kernel positions

// Weight, gradient and output of a layer lie in memory in the same dense order, whose dimension 0 is the one with
// stride 1.
struct BackwardLayer {
  const void* weight;
  const void* grad;
  void* output;
  // a, b, c, d, of which S = a b + c d, or half of it: u_out, v_out, u_in, v_in, or where dimension 2 are the input
  // channels u_in, v_in, u_out, v_out. In place of those that are missing something that can be read.
  const float* vectors[4];
  const float* sigma;
  LawNumber number;
  uint32_t size;
  Divisor inner, plane;  // sizes of dimension 0, and of dimensions 0 and 1 together
  uint32_t middle;       // size of dimension 1
  uint32_t kernel;
  uint8_t steps[4][3];  // how far one step along each dimension leads in each of the vectors: 0, 1 or kKernelStep
  uint32_t dot_tiles;
  union {
    uint32_t first_dot_tiles;  // in the first segment
    uint32_t summed_by;        // the first ticket after its dot tiles, where G is kept
  };
  uint32_t write_tiles;
  uint32_t sums;       // index of the first tile's sum
  uint32_t grad_gain;  // index of a gain's gradient
  uint32_t claims;     // where the words of its tiles are, where G is kept: see backward_keeping.h
  RowTiles rows;
  uint16_t kept_steps;  // of G, of each tile; 0: nothing is kept
  uint8_t directions;   // 1: a b, 2: c d, 3: both
  uint8_t law;          // LawKind

  // vector: 0 or 1 for a b, 2 or 3 for c d.
  BSSN_HD bool has(int vector) const { return (directions & (vector < 2 ? 1 : 2)) != 0; }
  BSSN_HD bool two_sided() const { return directions == 3; }
  BSSN_HD uint32_t row_pieces() const { return plane.value / kBackwardPiece; }
  BSSN_HD uint32_t n_rows() const { return plane(size); }
  BSSN_HD bool keeps() const { return kept_steps > 0; }
  BSSN_HD bool slack() const { return is_slack(number, law, *sigma); }
  BSSN_HD uint32_t step(int vector, int dimension) const {
    const uint32_t step = steps[vector][dimension];
    return step == kKernelStep ? kernel : step;
  }
};

constexpr int kBackwardThreads = 256;  // of a block; at most 80 registers each
constexpr int kBackwardBlocks = 3;     // on a multiprocessor at a time

// Shared memory: the block's own, then a sum of each warp, then what is kept.
constexpr uint32_t kWarpSumsAt = 16;
constexpr uint32_t kBackwardShared = kWarpSumsAt + kBackwardThreads / 32 * sizeof(double);
static_assert(kBackwardShared % 16 == 0, "pieces of 16 bytes");

struct BackwardRecord {
  float multiplier, ratio;  // dW = multiplier (G - ratio S)
};

struct BackwardCall {
  uint32_t* counters;  // as in ForwardCall
  BackwardRecord* records;
  double* sums;
  float* grad_gains;
  int32_t n_segments;
  int32_t grad_type;                      // DType
  uint32_t dot_elements, write_elements;  // of a tile
  uint32_t first_ticket, end_ticket;      // of this launch
  uint32_t ticket_counter;

  BSSN_HD uint32_t* claim(const BackwardLayer& layer, uint32_t tile) const { return counters + layer.claims + tile; }
};

template <int Capacity>
struct BackwardArgs {
  BackwardCall call;
  Segment segments[Capacity * kBackwardSegments];
  BackwardLayer layers[Capacity];
};

struct BackwardTableArgs {
  BackwardCall call;
  const Segment* segments;  // in device memory
  const BackwardLayer* layers;
};

}  // namespace bssn::cuda
