// One tile of a layer's power iteration: its rows' s and q, and its share of t and r.
#pragma once

#include "pieces.h"
#include "schedule.h"

namespace bssn::cpu {

template <class T>
struct Sums {
  T *s, *q;  // [c_out], [c_out, kernel]
  T *t, *r;  // [tiles, columns], [tiles, r_size]: each tile's sums
  T* r_sum;  // [c_in]
  T factor;  // of the weight
};

// What a thread needs.
template <class T>
struct ForwardRoom {
  T *u, *v, *q, *scratch;
  RowBuffer<T> rows;
};

// Rows of output channels give r in one number for each column; rows of input channels for each channel.
inline int64_t r_size(const Layer& layer) { return layer.order == Order::input_major ? layer.c_in : layer.columns(); }

template <class T>
class TileReader {
 public:
  // Without `iterate` only s and q.
  TileReader(const Layer& layer, DType type, bool iterate, const Ticket& ticket, const Sums<T>& sums,
             ForwardRoom<T>& room)
      : layer_(layer),
        type_(type),
        iterate_(iterate),
        begin_(ticket.begin),
        end_(ticket.end),
        s_(sums.s),
        q_(layer.two_sided ? sums.q : nullptr),
        t_(sums.t + ticket.tile * layer.columns()),
        r_(layer.two_sided ? sums.r + ticket.tile * r_size(layer) : nullptr),
        room_(room) {}

  void read() {
    if (layer_.order == Order::input_major) return read_input_major();
    if (iterate_) {
      std::fill_n(t_, layer_.columns(), T(0));
      if (r_ != nullptr) std::fill_n(r_, layer_.columns(), T(0));
    }
    // Rows of a matrix that are read in place need no room, and blocks of them stay in the second-level cache.
    const bool steps = iterate_ && layer_.kernel == 1 && r_ == nullptr && layer_.columns() <= kStepColumns;
    if (steps && direct<T>(layer_, type_)) return read_in_steps(static_cast<const T*>(layer_.vectors[1]), nullptr);
    if (!in_one_piece(layer_)) return read_in_pieces();
    for_pieces(layer_, [&](const Piece& piece) { read_whole_rows(piece); });
  }

 private:
  static constexpr int64_t kInputRows = 4;  // rows of input-major layers worked on together
  static constexpr int64_t kStepColumns = 128 * 1024;
  static constexpr int64_t kAhead = 12;  // rows of them that are fetched ahead: they are short

  T* q_of(int64_t row) const { return q_ == nullptr ? nullptr : q_ + row * layer_.kernel; }

  // Calls use(row, count, rows) with a piece of `count` rows at a time.
  template <class Use>
  void for_blocks(const Piece& piece, Use use) {
    const int64_t block = block_rows(layer_);
    for (int64_t row = begin_; row < end_; row += block) {
      const int64_t count = std::min(block, end_ - row);
      const T* rows[kMaxBlockRows];
      read_rows(layer_, layer_.weight, type_, row, count, piece, room_.rows, rows);
      use(row, count, rows);
    }
  }

  void read_whole_rows(const Piece& piece) {
    const int64_t n = piece.size(), kernel = layer_.kernel;
    const T* v = in_row_order(layer_, piece, layer_.vectors[1], room_.v);
    const T* u = over_columns(piece, static_cast<const T*>(layer_.vectors[2]), room_.u);
    if (iterate_ && direct<T>(layer_, type_)) return read_in_steps(v, u);
    for_blocks(piece, [&](int64_t row, int64_t count, const T* const* rows) {
      kernels<T>().dot_rows(rows, count, v, u, n, kernel, piece.kernel_major, room_.scratch, s_ + row, q_of(row));
      if (!iterate_) return;
      kernels<T>().add_rows(rows, count, s_ + row, q_of(row), n, kernel, piece.kernel_major, 0, room_.scratch, t_, r_);
    });
  }

  // Rows that are read in place: while a block of them is added, the next is on its way from memory.
  void read_in_steps(const T* v, const T* u) {
    const int64_t n = layer_.columns(), kernel = layer_.kernel;
    const bool major = kernel_major(layer_);
    const T *rows[kStepRows], *next[kStepRows];
    const auto point = [&](const T** to, int64_t row) {
      for (int64_t j = 0; j < std::min<int64_t>(kStepRows, end_ - row); ++j)
        to[j] = static_cast<const T*>(layer_.weight) + (row + j) * n;
    };
    int64_t row = begin_, count = std::min<int64_t>(kStepRows, end_ - row);
    point(rows, row);
    kernels<T>().dot_rows(rows, count, v, u, n, kernel, major, room_.scratch, s_ + row, q_of(row));
    for (; row + 2 * kStepRows <= end_; row += kStepRows) {
      point(next, row + kStepRows);
      kernels<T>().step(rows, s_ + row, q_of(row), next, v, u, n, kernel, major, room_.scratch, s_ + row + kStepRows,
                        q_of(row + kStepRows), t_, r_);
      std::copy_n(next, kStepRows, rows);
    }
    kernels<T>().add_rows(rows, count, s_ + row, q_of(row), n, kernel, major, 0, room_.scratch, t_, r_);
    row += count;
    count = end_ - row;
    if (count == 0) return;
    point(rows, row);
    kernels<T>().dot_rows(rows, count, v, u, n, kernel, major, room_.scratch, s_ + row, q_of(row));
    kernels<T>().add_rows(rows, count, s_ + row, q_of(row), n, kernel, major, 0, room_.scratch, t_, r_);
  }

  // Long rows: s and q are complete only after all pieces, so that all are read once more for t and r.
  void read_in_pieces() {
    double s_sums[kMaxTileRows] = {};
    if (q_ != nullptr) std::fill(q_of(begin_), q_of(end_), T(0));
    for_pieces(layer_, [&](const Piece& piece) { dot_piece(piece, s_sums); });
    for (int64_t row = begin_; row < end_; ++row) s_[row] = T(s_sums[row - begin_]);
    if (iterate_) for_pieces(layer_, [&](const Piece& piece) { add_piece(piece); });
  }

  void dot_piece(const Piece& piece, double* s_sums) {
    const int64_t n = piece.size();
    const bool with_q = q_ != nullptr && !piece.long_kernel;
    const T* v = in_row_order(layer_, piece, layer_.vectors[1], room_.v);
    const T* u = over_columns(piece, static_cast<const T*>(layer_.vectors[2]), room_.u);
    for_blocks(piece, [&](int64_t row, int64_t count, const T* const* rows) {
      T s[kMaxBlockRows];
      kernels<T>().dot_rows(rows, count, v, u, n, piece.positions, false, room_.scratch, s, with_q ? room_.q : nullptr);
      for (int64_t j = 0; j < count; ++j) {
        s_sums[row + j - begin_] += double(s[j]);
        if (q_ == nullptr) continue;
        T* q = q_of(row + j) + piece.position;
        if (piece.long_kernel) {  // one channel: each column is a position
          kernels<T>().add_rows(rows + j, 1, u, nullptr, n, 1, false, 0, room_.scratch, q, nullptr);
        } else {
          kernels<T>().add(room_.q + j * piece.positions, piece.positions, q);
        }
      }
    });
  }

  void add_piece(const Piece& piece) {
    const int64_t n = piece.size();
    const bool with_r = r_ != nullptr && !piece.long_kernel;
    T* r = r_ == nullptr ? nullptr : r_ + piece.first;
    for_blocks(piece, [&](int64_t row, int64_t count, const T* const* rows) {
      if (with_r) {
        for (int64_t j = 0; j < count; ++j) {
          std::copy_n(q_of(row + j) + piece.position, piece.positions, room_.q + j * piece.positions);
        }
      }
      kernels<T>().add_rows(rows, count, s_ + row, room_.q, n, piece.positions, false, 0, room_.scratch,
                            t_ + piece.first, with_r ? r : nullptr);
      if (r == nullptr || with_r) return;
      for (int64_t j = 0; j < count; ++j) {  // one channel, whose r may come in any of its columns
        *r += T(kernels<T>().inner(rows[j], q_of(row + j) + piece.position, n));
      }
    });
  }

  // The same for W[i, o, k], a range of o at a time. What was summed up over the columns of a row is now added up over
  // rows, and the other way round: one pass over the tile's rows gives q and s, a second one, from the cache, r and t.
  void read_input_major() {
    const int64_t k_size = layer_.kernel, n = (end_ - begin_) * k_size;
    const T* v_out = static_cast<const T*>(layer_.vectors[1]);
    const T* u_in = static_cast<const T*>(layer_.vectors[2]);
    const T zeros[kInputRows] = {};
    T* s_columns = room_.v;  // s[o, k], to be summed up over k
    T* q = q_ != nullptr ? q_of(begin_) : room_.u;
    double* totals =
        reinterpret_cast<double*>(room_.rows.raw);  // of q and s_columns: fp32 sums of more rows lose digits
    std::fill_n(totals, 2 * n, 0.0);
    add_tiles(layer_.c_in, kMaxTileRows, [&](int64_t first, int64_t end) {
      std::fill_n(s_columns, n, T(0));
      std::fill_n(q, n, T(0));
      for_input_rows(first, end, [&](int64_t i, int64_t count, const T* const* rows) {
        kernels<T>().add_rows(rows, count, layer_.two_sided ? u_in + i : zeros, v_out + i * k_size, n, k_size, false,
                              kAhead * row_size(layer_), room_.scratch, q, s_columns);
      });
      if (layer_.c_in <= kMaxTileRows) return;
      for (int64_t x = 0; x < n; ++x) {
        q[x] = T(totals[x] += double(q[x]));
        s_columns[x] = T(totals[n + x] += double(s_columns[x]));
      }
    });
    T* s = s_ + begin_;
    for (int64_t o = 0; o < end_ - begin_; ++o) {
      s[o] = 0;
      for (int64_t k = 0; k < k_size; ++k) s[o] += s_columns[o * k_size + k];
    }
    if (!iterate_) return;
    const T* s_expanded = over_columns(Piece{0, 0, end_ - begin_, 0, k_size, false, false}, s, s_columns);
    for_input_rows(0, layer_.c_in, [&](int64_t i, int64_t count, const T* const* rows) {
      T unused[kInputRows];
      kernels<T>().dot_rows(rows, count, q, s_expanded, n, k_size, false, room_.scratch,
                            r_ != nullptr ? r_ + i : unused, t_ + i * k_size);
    });
  }

  template <class Use>
  void for_input_rows(int64_t begin, int64_t end, Use use) {
    const T* first = static_cast<const T*>(layer_.weight) + begin_ * layer_.kernel;
    for (int64_t i = begin; i < end; i += kInputRows) {
      const int64_t count = std::min(kInputRows, end - i);
      const T* rows[kInputRows];
      for (int64_t j = 0; j < count; ++j) rows[j] = first + (i + j) * row_size(layer_);
      use(i, count, rows);
    }
  }

  const Layer& layer_;
  DType type_;
  bool iterate_;
  int64_t begin_, end_;  // rows
  T *s_, *q_, *t_, *r_;  // s and q of the layer, t and r of the tile; q and r only of two-sided layers
  ForwardRoom<T>& room_;
};

}  // namespace bssn::cpu
