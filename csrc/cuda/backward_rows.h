// How the gradient of a layer whose memory is a list of rows is written. A row is all that belongs to one output channel,
// or of transposed convolutions to one input channel, in any order, if its length is a multiple of four:
//
//   dW = g (G - ratio (a b + c d)),   a of a row, b and c of a column, d of both
//
// a, b, c, d are u_out, v_out, u_in, v_in, or with the directions exchanged u_in, v_in, u_out, v_out. A tile is a range of
// columns of some rows. A thread keeps its four columns' b and c in registers, and goes through the rows.
#pragma once

#include "backward_args.h"

namespace bssn::cuda {

// An element's coordinates, dimension 0 being the one with stride 1.
struct Place {
  uint32_t x0, x1, x2;

  BSSN_HD Place(const BackwardLayer& layer, uint32_t element) {
    const uint32_t lines = layer.inner(element);
    x2 = layer.plane(element);
    x1 = lines - x2 * layer.middle;
    x0 = element - lines * layer.inner.value;
  }

  BSSN_HD void to_next(const BackwardLayer& layer) {
    if (++x0 < layer.inner.value) return;
    x0 = 0;
    if (++x1 < layer.middle) return;
    x1 = 0;
    ++x2;
  }

  // Where its element of a vector lies.
  BSSN_HD uint32_t in(const BackwardLayer& layer, int vector) const {
    return x0 * layer.step(vector, 0) + x1 * layer.step(vector, 1) + x2 * layer.step(vector, 2);
  }
};

// A thread's columns of a tile, with what stays the same in all rows, and its rows.
struct GradientColumns {
  uint32_t piece;  // of a row
  uint32_t row, end, step;
  float b[kBackwardPiece], c[kBackwardPiece];  // times ratio
  uint32_t at_d[kBackwardPiece];               // in row 0

  BSSN_HD GradientColumns(const BackwardLayer& layer, float ratio, uint32_t tile, int thread) {
    const RowTiles& rows = layer.rows;
    const uint32_t down = tile / rows.column_blocks, group = uint32_t(thread) / rows.width;
    const uint32_t pieces = layer.plane.value / kBackwardPiece;
    piece = (tile - down * rows.column_blocks) * rows.width + uint32_t(thread) - group * rows.width;
    row = down * rows.tile_rows + group;
    step = rows.rows_at_once;
    const bool works = group < rows.rows_at_once && piece < pieces;
    end = works ? lesser((down + 1) * rows.tile_rows, layer.size / layer.plane.value) : 0;
    Place place(layer, lesser(piece, pieces - 1) * kBackwardPiece);
    BSSN_UNROLL
    for (int j = 0; j < kBackwardPiece; ++j) {
      // Both are loaded in any case: four loads one behind the other would take four times as long.
      const float v = layer.vectors[1][place.in(layer, 1)], u = layer.vectors[2][place.in(layer, 2)];
      b[j] = layer.has(0) ? ratio * v : 0.0f;
      c[j] = layer.has(2) ? ratio * u : 0.0f;
      at_d[j] = place.in(layer, 3);
      place.to_next(layer);
    }
  }
};

template <class W, class G>
BSSN_HD void write_gradient_rows(const BackwardLayer& layer, float multiplier, const GradientColumns& my) {
  constexpr int kPiece = kBackwardPiece, kAhead = 4;
  const uint32_t pieces = layer.plane.value / kPiece, step_d = layer.step(3, 2);
  const bool has_ab = layer.has(0), has_cd = layer.has(2);
  const Pack<G, kPiece>* const grads = static_cast<const Pack<G, kPiece>*>(layer.grad) + my.piece;
  Pack<W, kPiece>* const outputs = static_cast<Pack<W, kPiece>*>(layer.output) + my.piece;
  BSSN_UNROLL_BY(1)
  for (uint32_t row = my.row; row < my.end; row += kAhead * my.step) {
    Pack<G, kPiece> g[kAhead];
    float a[kAhead], d[kAhead][kPiece];
    BSSN_UNROLL
    for (int n = 0; n < kAhead; ++n) g[n] = load_once(grads + lesser(row + n * my.step, my.end - 1) * pieces);
    BSSN_UNROLL
    for (int n = 0; n < kAhead; ++n) {
      const uint32_t at = lesser(row + n * my.step, my.end - 1);
      a[n] = has_ab ? layer.vectors[0][at] : 0.0f;
      BSSN_UNROLL
      for (int j = 0; j < kPiece; ++j) d[n][j] = has_cd ? layer.vectors[3][at * step_d + my.at_d[j]] : 0.0f;
    }
    BSSN_UNROLL
    for (int n = 0; n < kAhead; ++n) {
      if (row + n * my.step >= my.end) break;
      Pack<W, kPiece> result;
      BSSN_UNROLL
      for (int j = 0; j < kPiece; ++j) {
        result.set(j, multiplier * (g[n].get(j) - a[n] * my.b[j] - d[n][j] * my.c[j]));
      }
      store_once(outputs + (row + n * my.step) * pieces, result);
    }
  }
}

}  // namespace bssn::cuda
