// Inner loops of the power iteration, for kernels.cpp alone: products of rows with vectors, and sums over rows.
#pragma once

#include "kernels.h"
#include "vectors.h"

namespace bssn::cpu::BSSN_ISA {
namespace {

// sum_x w[x] v[x] and sum_x w[x] u[x]
template <class T>
void dot_pair(const T* w, const T* v, const T* u, int64_t n, T* s, T* q) {
  Vec<T> s_sums[4] = {}, q_sums[4] = {};
  int64_t x = 0;
  const auto step = [&](int p) {
    const Vec<T> value = load_vec(w + x + p * kLanes<T>);
    s_sums[p] += value * load_vec(v + x + p * kLanes<T>);
    q_sums[p] += value * load_vec(u + x + p * kLanes<T>);
  };
  for (; x + 4 * kLanes<T> <= n; x += 4 * kLanes<T>) {
    for (int p = 0; p < 4; ++p) step(p);
  }
  for (; x + kLanes<T> <= n; x += kLanes<T>) step(0);
  *s = sum_lanes<T>((s_sums[0] + s_sums[1]) + (s_sums[2] + s_sums[3]));
  *q = sum_lanes<T>((q_sums[0] + q_sums[1]) + (q_sums[2] + q_sums[3]));
  for (; x < n; ++x) {
    *s += w[x] * v[x];
    *q += w[x] * u[x];
  }
}

// The whole periods of R channel-major rows, with P (a multiple of the period) vectors of running sums for each row in
// registers. Returns the number of columns done.
template <class T, int P, int R>
int64_t dot_periods(const T* const* w, const T* v, const T* u, int64_t n, Vec<T>* s, T* q_lanes, int64_t stride) {
  constexpr int kChains = 4 / R;  // sums of s for each row: enough of them to hide an addition's latency
  Vec<T> s_sums[R][kChains] = {};
  Vec<T> q_sums[R][P] = {};
  int64_t x = 0;
  for (; x + P * kLanes<T> <= n; x += P * kLanes<T>) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const Vec<T> v_x = load_vec(v + x + p * kLanes<T>), u_x = load_vec(u + x + p * kLanes<T>);
#pragma GCC unroll 4
      for (int row = 0; row < R; ++row) {
        const Vec<T> value = load_vec(w[row] + x + p * kLanes<T>);
        s_sums[row][p % kChains] += value * v_x;
        q_sums[row][p] += value * u_x;
      }
    }
  }
  // Unrolled, or the sums would lie in memory.
#pragma GCC unroll 4
  for (int row = 0; row < R; ++row) {
    s[row] = s_sums[row][0];
#pragma GCC unroll 4
    for (int c = 1; c < kChains; ++c) s[row] += s_sums[row][c];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) store_vec(q_lanes + row * stride + p * kLanes<T>, q_sums[row][p]);
  }
  return x;
}

// The same for long periods: the running sums stay in memory (the first-level cache).
template <class T, int R>
int64_t dot_long_periods(const T* const* w, const T* v, const T* u, int64_t n, int64_t period, Vec<T>* s, T* q_lanes,
                         int64_t stride) {
  Vec<T> s_sums[R] = {};
  for (int row = 0; row < R; ++row) {
    for (int64_t l = 0; l < period * kLanes<T>; l += kLanes<T>) store_vec(q_lanes + row * stride + l, Vec<T>{});
  }
  int64_t x = 0;
  for (; x + period * kLanes<T> <= n; x += period * kLanes<T>) {
    for (int64_t p = 0; p < period * kLanes<T>; p += kLanes<T>) {
      const Vec<T> v_x = load_vec(v + x + p), u_x = load_vec(u + x + p);
#pragma GCC unroll 4
      for (int row = 0; row < R; ++row) {
        const Vec<T> value = load_vec(w[row] + x + p);
        T* q = q_lanes + row * stride + p;
        s_sums[row] += value * v_x;
        store_vec<T>(q, load_vec(q) + value * u_x);
      }
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < R; ++row) s[row] = s_sums[row];
  return x;
}

// q[k] = the sum of the lanes of kernel position k, the lanes being those of one period.
template <class T>
void sum_positions(const T* q_lanes, int64_t period, int64_t kernel, T* q) {
  for (int64_t first = 0; first < kernel; first += kLanes<T>) {
    Vec<T> sum = load_vec(q_lanes + first);
    for (int64_t l = kernel; l < period; l += kernel) sum += load_vec(q_lanes + l + first);
    T positions[kLanes<T>];
    store_vec<T>(positions, sum);
    for (int64_t k = first; k < kernel && k < first + kLanes<T>; ++k) q[k] = positions[k - first];
  }
}

// The columns from `done` on, which is a multiple of the period, and the sums of all of them.
template <class T, int R>
void dot_rest(const T* const* w, const T* v, const T* u, int64_t n, int64_t kernel, int64_t period, int64_t done,
              const Vec<T>* s_sums, T* q_lanes, int64_t stride, T* s, T* q) {
  for (int row = 0; row < R; ++row) {
    T* lanes = q_lanes + row * stride;
    Vec<T> s_sum = s_sums[row];
    int64_t x = done;
    for (int64_t p = 0; x + kLanes<T> <= n; x += kLanes<T>, p += kLanes<T>) {
      const Vec<T> value = load_vec(w[row] + x);
      s_sum += value * load_vec(v + x);
      store_vec<T>(lanes + p, load_vec(lanes + p) + value * load_vec(u + x));
    }
    T* q_row = q + row * kernel;
    sum_positions(lanes, period * kLanes<T>, kernel, q_row);
    T total = sum_lanes<T>(s_sum);
    for (int64_t k = x % kernel; x < n; ++x) {
      total += w[row][x] * v[x];
      q_row[k] += w[row][x] * u[x];
      if (++k == kernel) k = 0;
    }
    s[row] = total;
  }
}

// Rows whose running sums, P vectors each, fit into the registers together; a divisor of kStepRows.
#if defined(__AVX512F__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
constexpr int rows_at_once(int p) { return 4 * p + 7 <= kRegisters ? 4 : 2 * p + 7 <= kRegisters ? 2 : 1; }

// P = 0 stands for a long period.
template <class T, int P, int R>
void dot_some(const T* const* w, const T* v, const T* u, int64_t n, int64_t kernel, T* q_lanes, T* s, T* q) {
  const int64_t stride = period_elements(kernel), period = P != 0 ? P : period_vectors<T>(kernel);
  Vec<T> s_sums[R];
  int64_t done;
  if constexpr (P != 0) {
    done = dot_periods<T, P, R>(w, v, u, n, s_sums, q_lanes, stride);
  } else {
    done = dot_long_periods<T, R>(w, v, u, n, period, s_sums, q_lanes, stride);
  }
  dot_rest<T, R>(w, v, u, n, kernel, period, done, s_sums, q_lanes, stride, s, q);
}

template <class T, int P>
void dot_channel_major(const T* const* w, int64_t rows, const T* v, const T* u, int64_t n, int64_t kernel, T* q_lanes,
                       T* s, T* q) {
  constexpr int R = P == 0 ? 4 : rows_at_once(P);
  int64_t row = 0;
  for (; row + R <= rows; row += R) dot_some<T, P, R>(w + row, v, u, n, kernel, q_lanes, s + row, q + row * kernel);
  for (; row < rows; ++row) dot_some<T, P, 1>(w + row, v, u, n, kernel, q_lanes, s + row, q + row * kernel);
}

template <int P>
struct Period {
  static constexpr int value = P;
};

// Calls body(Period<P>()) with the number of vectors whose sums are kept in registers for a kernel of this size.
template <class T, class Body>
inline void with_period(int64_t kernel, Body body) {
  switch (period_vectors<T>(kernel)) {
    case 1:
    case 2:
    case 4:
      return body(Period<4>());
    case 3:
      return body(Period<3>());
    case 5:
      return body(Period<5>());
    case 7:
      return body(Period<7>());
    case 9:
      return body(Period<9>());
    default:
      return body(Period<0>());
  }
}

template <class T>
void dot_rows(const T* const* w, int64_t rows, const T* v, const T* u, int64_t n, int64_t kernel, bool kernel_major,
              T* scratch, T* s, T* q) {
  if (q == nullptr) {
    for (int64_t row = 0; row < rows; ++row) s[row] = dot_plain(w[row], v, n);
    return;
  }
  if (kernel_major) {
    const int64_t channels = n / kernel;
    for (int64_t row = 0; row < rows; ++row) {
      s[row] = 0;
      for (int64_t k = 0; k < kernel; ++k) {
        T share;
        dot_pair(w[row] + k * channels, v + k * channels, u, channels, &share, q + row * kernel + k);
        s[row] += share;
      }
    }
    return;
  }
  with_period<T>(kernel, [&](auto period) {
    dot_channel_major<T, decltype(period)::value>(w, rows, v, u, n, kernel, scratch, s, q);
  });
}

// `repeated` receives `values` [kernel], from position `shift` on, again and again up to `count` elements, a multiple
// of `kernel`, and less than a vector more.
template <class T>
void repeat(const T* values, int64_t kernel, int64_t shift, int64_t count, T* repeated) {
  for (int64_t k = 0; k < kernel; ++k) repeated[k] = values[k + shift < kernel ? k + shift : k + shift - kernel];
  // Vectors reach beyond the end of a repetition, into the beginning of the next, which is written later.
  for (int64_t first = (kernel - 1) / kLanes<T> * kLanes<T>; first >= 0; first -= kLanes<T>) {
    const Vec<T> some = load_vec(repeated + first);
    for (int64_t l = kernel; l < count; l += kernel) store_vec(repeated + l + first, some);
  }
}

// t[x] += sum_row s[row] w[row][x]
template <class T, int R>
void add_scaled(const T* const* w, const T* s, int64_t begin, int64_t end, int64_t ahead, T* t) {
  int64_t x = begin;
  for (; x + kLanes<T> <= end; x += kLanes<T>) {
    Vec<T> sum = load_vec(t + x);
    for (int row = 0; row < R; ++row) {
      if (ahead != 0) __builtin_prefetch(w[row] + x + ahead, 0, 2);
      sum += s[row] * load_vec(w[row] + x);
    }
    store_vec<T>(t + x, sum);
  }
  for (; x < end; ++x) {
    for (int row = 0; row < R; ++row) t[x] += s[row] * w[row][x];
  }
}

// The columns from `begin` on, which is a multiple of `period`, the elements for which q has been repeated.
template <class T, int R>
void add_both_from(const T* const* w, const T* s, const T* q, int64_t begin, int64_t n, int64_t kernel, int64_t period,
                   const T* repeated, int64_t stride, int64_t ahead, T* t, T* r) {
  int64_t x = begin;
  while (x + kLanes<T> <= n) {
    for (int64_t p = 0; p < period && x + kLanes<T> <= n; p += kLanes<T>, x += kLanes<T>) {
      Vec<T> t_sum = load_vec(t + x), r_sum = load_vec(r + x);
      for (int row = 0; row < R; ++row) {
        if (ahead != 0) __builtin_prefetch(w[row] + x + ahead, 0, 2);
        const Vec<T> value = load_vec(w[row] + x);
        t_sum += s[row] * value;
        r_sum += load_vec(repeated + row * stride + p) * value;
      }
      store_vec<T>(t + x, t_sum);
      store_vec<T>(r + x, r_sum);
    }
  }
  for (; x < n; ++x) {
    for (int row = 0; row < R; ++row) {
      t[x] += s[row] * w[row][x];
      r[x] += q[row * kernel + x % kernel] * w[row][x];
    }
  }
}

template <class T, int R>
void add_both(const T* const* w, const T* s, const T* q, int64_t n, int64_t kernel, bool kernel_major, int64_t ahead,
              T* scratch, T* t, T* r) {
  if (kernel_major) {
    const int64_t channels = n / kernel;
    for (int64_t k = 0; k < kernel; ++k) {
      T q_k[R];
      for (int row = 0; row < R; ++row) q_k[row] = q[row * kernel + k];
      add_scaled<T, R>(w, s, k * channels, (k + 1) * channels, ahead, t);
      add_scaled<T, R>(w, q_k, k * channels, (k + 1) * channels, 0, r);
    }
    return;
  }
  const int64_t stride = period_elements(kernel);
  const int64_t period = period_vectors<T>(kernel) * kLanes<T>;
  for (int row = 0; row < R; ++row) repeat(q + row * kernel, kernel, 0, period, scratch + row * stride);
  add_both_from<T, R>(w, s, q, 0, n, kernel, period, scratch, stride, ahead, t, r);
}

template <class T>
void add_rows(const T* const* w, int64_t rows, const T* s, const T* q, int64_t n, int64_t kernel, bool kernel_major,
              int64_t ahead, T* scratch, T* t, T* r) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    if (r == nullptr) {
      add_scaled<T, 4>(w + row, s + row, 0, n, ahead, t);
    } else {
      add_both<T, 4>(w + row, s + row, q + row * kernel, n, kernel, kernel_major, ahead, scratch, t, r);
    }
  }
  for (; row < rows; ++row) {
    if (r == nullptr) {
      add_scaled<T, 1>(w + row, s + row, 0, n, ahead, t);
    } else {
      add_both<T, 1>(w + row, s + row, q + row * kernel, n, kernel, kernel_major, ahead, scratch, t, r);
    }
  }
}

// add_rows of some rows and dot_rows of others in one loop over the columns: while the processor waits for the latter,
// which come from memory, it has the former to add, which are in the cache. P: vectors of running sums for each row.
template <class T, int P>
void step_channel_major(const T* const* w, const T* s, const T* q, const T* const* next, const T* v, const T* u,
                        int64_t n, int64_t kernel, T* scratch, T* next_s, T* next_q, T* t, T* r) {
  constexpr int R = kStepRows;
  const int64_t stride = period_elements(kernel);
  T* const repeated = scratch;
  T* const q_lanes = scratch + R * stride;
  for (int row = 0; row < R; ++row) repeat(q + row * kernel, kernel, 0, P * kLanes<T>, repeated + row * stride);
  Vec<T> s_sums[R] = {};
  Vec<T> q_sums[R][P] = {};
  int64_t x = 0;
  for (; x + P * kLanes<T> <= n; x += P * kLanes<T>) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const int64_t at = x + p * kLanes<T>;
      const Vec<T> v_x = load_vec(v + at), u_x = load_vec(u + at);
#pragma GCC unroll 4
      for (int row = 0; row < R; ++row) {
        const Vec<T> value = load_vec(next[row] + at);
        s_sums[row] += value * v_x;
        q_sums[row][p] += value * u_x;
      }
      Vec<T> t_sum = load_vec(t + at), r_sum = load_vec(r + at);
#pragma GCC unroll 4
      for (int row = 0; row < R; ++row) {
        const Vec<T> value = load_vec(w[row] + at);
        t_sum += s[row] * value;
        r_sum += load_vec(repeated + row * stride + p * kLanes<T>) * value;
      }
      store_vec<T>(t + at, t_sum);
      store_vec<T>(r + at, r_sum);
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < R; ++row) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) store_vec(q_lanes + row * stride + p * kLanes<T>, q_sums[row][p]);
  }
  dot_rest<T, R>(next, v, u, n, kernel, P, x, s_sums, q_lanes, stride, next_s, next_q);
  add_both_from<T, R>(w, s, q, x, n, kernel, P * kLanes<T>, repeated, stride, 0, t, r);
}

template <class T, int R>
void step_plain(const T* const* w, const T* s, const T* const* next, const T* v, int64_t n, T* next_s, T* t) {
  Vec<T> s_sums[R] = {};
  int64_t x = 0;
  for (; x + kLanes<T> <= n; x += kLanes<T>) {
    const Vec<T> v_x = load_vec(v + x);
    Vec<T> t_sum = load_vec(t + x);
    for (int row = 0; row < R; ++row) {
      s_sums[row] += load_vec(next[row] + x) * v_x;
      t_sum += s[row] * load_vec(w[row] + x);
    }
    store_vec<T>(t + x, t_sum);
  }
  for (int row = 0; row < R; ++row) next_s[row] = sum_lanes<T>(s_sums[row]);
  for (; x < n; ++x) {
    for (int row = 0; row < R; ++row) {
      next_s[row] += next[row][x] * v[x];
      t[x] += s[row] * w[row][x];
    }
  }
}

template <class T>
void step(const T* const* w, const T* s, const T* q, const T* const* next, const T* v, const T* u, int64_t n,
          int64_t kernel, bool kernel_major, T* scratch, T* next_s, T* next_q, T* t, T* r) {
  const auto one_after_another = [&] {
    add_rows(w, kStepRows, s, q, n, kernel, kernel_major, next[0] - w[0], scratch, t, r);
    dot_rows(next, kStepRows, v, u, n, kernel, kernel_major, scratch, next_s, next_q);
  };
  if (q == nullptr) return step_plain<T, kStepRows>(w, s, next, v, n, next_s, t);
  if (kernel_major) return one_after_another();
  with_period<T>(kernel, [&](auto period) {
    constexpr int P = decltype(period)::value;
    if constexpr (P != 0 && rows_at_once(P) == kStepRows) {
      step_channel_major<T, P>(w, s, q, next, v, u, n, kernel, scratch, next_s, next_q, t, r);
    } else {
      one_after_another();
    }
  });
}

}  // namespace
}  // namespace bssn::cpu::BSSN_ISA
