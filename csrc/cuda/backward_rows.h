// How the gradient of a layer whose memory is a list of rows is written. A row is all that belongs to one output
// channel, or of transposed convolutions to one input channel, in any order, if its length is a multiple of four:
//
//   dW = g (G - ratio (a b + c d)),   a of a row, b and c of a column, d of both
//
// a, b, c, d are u_out, v_out, u_in, v_in, or with the directions exchanged u_in, v_in, u_out, v_out. A tile is a range
// of columns of some rows. A thread keeps its four columns' b and c in registers, and goes through the rows.
#pragma once

#include "backward_args.h"
#include "streaming.h"

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

  // Where its element of a vector lies.
  BSSN_HD uint32_t in(const BackwardLayer& layer, int vector) const {
    return x0 * layer.step(vector, 0) + x1 * layer.step(vector, 1) + x2 * layer.step(vector, 2);
  }
};

// That a thread loads at a time, to write them. Fewer where rounding to bf16 takes many instructions, for the sake of
// the code's size.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr uint32_t kRowsAhead = 2;
#else
constexpr uint32_t kRowsAhead = 4;
#endif

// Calls f with a zero of an element type that is as long as another.
template <class F>
BSSN_HD void with_piece_type(int32_t type, F f) {
  if (type == int32_t(DType::f32)) {
    f(float{});
  } else {
    f(BFloat16{});
  }
}

// The beginning of four words as a piece.
template <class G>
BSSN_HD Pack<G, kBackwardPiece> piece_in(const Pack<float, kBackwardPiece>& words) {
  Pack<G, kBackwardPiece> piece;
  BSSN_UNROLL
  for (int w = 0; w < piece.kWords; ++w) piece.words[w] = words.words[w];
  return piece;
}

// A thread's columns of a tile, with what stays the same in all rows, its rows, and its part of some rows of G.
struct GradientColumns {
  uint32_t piece;  // of a row
  uint32_t row, end, step;
  Pack<float, kBackwardPiece> rows[kRowsAhead];  // as they lie in memory, of any dtype
  float b[kBackwardPiece], c[kBackwardPiece];
  uint32_t at_d[kBackwardPiece];  // in row 0

  BSSN_HD void take_place(const BackwardLayer& layer, uint32_t tile, int thread) {
    const RowTiles& tiles = layer.rows;
    const uint32_t down = tile / tiles.column_blocks, group = uint32_t(thread) / tiles.width;
    const uint32_t pieces = layer.row_pieces();
    piece = (tile - down * tiles.column_blocks) * tiles.width + uint32_t(thread) - group * tiles.width;
    row = down * tiles.tile_rows + group;
    step = tiles.rows_at_once;
    end = group < step && piece < pieces ? lesser((down + 1) * tiles.tile_rows, layer.n_rows()) : 0;
    piece = lesser(piece, pieces - 1);  // threads without work read what others read too
  }

  // Its part of the next N rows of G.
  template <uint32_t N>
  BSSN_HD void load_rows(const BackwardLayer& layer, int32_t grad_type) {
    with_piece_type(grad_type, [&](auto element) {
      using Piece = Pack<decltype(element), kBackwardPiece>;
      const Piece* const grads = piece_of<decltype(element)>(layer.grad, layer, 0);
      BSSN_UNROLL
      for (uint32_t n = 0; n < N; ++n) {
        const Piece loaded = load_streaming(grads + lesser(row + n * step, end - (end > 0)) * layer.row_pieces());
        BSSN_UNROLL
        for (int w = 0; w < 4; ++w) rows[n].words[w] = w < loaded.kWords ? loaded.words[w % loaded.kWords] : 0;
      }
    });
  }

  // b and c become what a and d are multiplied by, to be added to G.
  BSSN_HD void scale(const BackwardLayer& layer, const BackwardRecord& record) {
    // Of a direction that the layer does not have something is loaded all the same, and counts for nothing.
    const float factor = layer.two_sided() ? -0.5f * record.ratio : -record.ratio;
    BSSN_UNROLL
    for (int j = 0; j < kBackwardPiece; ++j) {
      b[j] *= layer.has(0) ? factor : 0.0f;
      c[j] *= layer.has(2) ? factor : 0.0f;
    }
  }

  // In row 0, where b and c are the same as in all others.
  BSSN_HD void load_vectors(const BackwardLayer& layer) {
    const uint32_t first_element = piece * kBackwardPiece;
    uint32_t x1 = layer.inner(first_element), x0 = first_element - x1 * layer.inner.value;
    const auto in = [&](int vector) { return x0 * layer.step(vector, 0) + x1 * layer.step(vector, 1); };
    BSSN_UNROLL
    for (int j = 0; j < kBackwardPiece; ++j) {
      b[j] = layer.vectors[1][in(1)];
      c[j] = layer.vectors[2][in(2)];
      at_d[j] = in(3);
      const bool ends = ++x0 == layer.inner.value;
      x0 = ends ? 0 : x0;
      x1 += ends;
    }
  }

  template <class T>
  BSSN_HD const Pack<T, kBackwardPiece>* piece_of(const void* memory, const BackwardLayer& layer, uint32_t at) const {
    return static_cast<const Pack<T, kBackwardPiece>*>(memory) + at * layer.row_pieces() + piece;
  }
};

// One row's piece of dW. The bits are the same whichever loop it stands in.
template <class W, class G>
BSSN_HD void write_piece(const GradientColumns& my, const Pack<G, kBackwardPiece>& g, float a, const float* d,
                         float multiplier, Pack<W, kBackwardPiece>* output) {
  Pack<W, kBackwardPiece> result;
  BSSN_UNROLL
  for (int j = 0; j < kBackwardPiece; ++j) {
    result.set(j, multiplier * fmaf(d[j], my.c[j], fmaf(a, my.b[j], g.get(j))));
  }
  store_streaming(output, result);
}

// Writes rows, four at a time, the first of which have been loaded. What is left at the end is for write_each_row.
template <class W, class G>
BSSN_HD void write_rows(const BackwardLayer& layer, float multiplier, GradientColumns& my) {
  using GradPiece = Pack<G, kBackwardPiece>;
  // Kept in a register: of what is an argument the compiler thinks that it can be read again each time.
  const uint32_t pieces = uint32_t(not_before_here(int(layer.row_pieces())));
  const uint32_t step_d = layer.step(3, 2), step = my.step;
  const float* const vector_a = layer.vectors[0];
  const float* const vector_d = layer.vectors[3];
  const GradPiece* const grads = static_cast<const GradPiece*>(layer.grad) + my.piece;
  Pack<W, kBackwardPiece>* const outputs = static_cast<Pack<W, kBackwardPiece>*>(layer.output) + my.piece;
  GradPiece g[kRowsAhead];
  BSSN_UNROLL
  for (uint32_t n = 0; n < kRowsAhead; ++n) g[n] = piece_in<G>(my.rows[n]);
  int are_loaded = 1;
  uint32_t row = my.row;
  BSSN_UNROLL_BY(1)
  for (; row + (kRowsAhead - 1) * step < my.end; row += kRowsAhead * step) {
    // The compiler shall not know that they are the first time: it would write the loop twice.
    if (not_before_here(are_loaded) == 0) {
      BSSN_UNROLL
      for (uint32_t n = 0; n < kRowsAhead; ++n) g[n] = load_streaming(grads + (row + n * step) * pieces);
    }
    are_loaded = 0;
    float a[kRowsAhead], d[kRowsAhead][kBackwardPiece];
    BSSN_UNROLL
    for (uint32_t n = 0; n < kRowsAhead; ++n) {
      const uint32_t at = row + n * step;
      a[n] = vector_a[at];
      BSSN_UNROLL
      for (int j = 0; j < kBackwardPiece; ++j) d[n][j] = vector_d[at * step_d + my.at_d[j]];
    }
    BSSN_UNROLL
    for (uint32_t n = 0; n < kRowsAhead; ++n) {
      write_piece<W>(my, g[n], a[n], d[n], multiplier, outputs + (row + n * step) * pieces);
    }
  }
  my.row = row;
}

// Writes rows one at a time. The thread's pieces of G lie in `grads` at place `at`, that of the first row, and then
// `distance` pieces apart.
template <class W>
BSSN_HD void write_each_row(const BackwardLayer& layer, int32_t grad_type, float multiplier, GradientColumns& my,
                            const void* grads, uint32_t at, uint32_t distance) {
  const uint32_t step_d = layer.step(3, 2);
  Pack<W, kBackwardPiece>* const outputs = static_cast<Pack<W, kBackwardPiece>*>(layer.output) + my.piece;
  BSSN_UNROLL_BY(1)
  for (; my.row < my.end; my.row += my.step, at += distance) {
    Pack<float, kBackwardPiece> g;
    with_element_type(grad_type, [&](auto element) {
      const auto piece = static_cast<const Pack<decltype(element), kBackwardPiece>*>(grads)[at];
      BSSN_UNROLL
      for (int j = 0; j < kBackwardPiece; ++j) g.set(j, piece.get(j));
    });
    float d[kBackwardPiece];
    BSSN_UNROLL
    for (int j = 0; j < kBackwardPiece; ++j) d[j] = layer.vectors[3][my.row * step_d + my.at_d[j]];
    write_piece<W>(my, g, layer.vectors[0][my.row], d, multiplier, outputs + my.row * layer.row_pieces());
  }
}

}  // namespace bssn::cuda
