// Inner loops, written with the vector extensions of GCC and Clang and compiled once for each instruction set
// (BSSN_ISA). Includes no standard header with inline functions: the linker could keep this file's AVX-512 copy of one
// for the whole program.
#include "kernels.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace bssn::cpu::BSSN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
constexpr int64_t kLanes = kVectorBytes / int64_t(sizeof(T));

template <class T>
inline Vec<T> load_vec(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
inline void store_vec(T* p, Vec<T> x) {
  *reinterpret_cast<Vec<T>*>(p) = x;
}

// Writes past the caches; p is aligned to the vector size.
inline void stream_vec(float* p, Vec<float> x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, x);
#else
  store_vec(p, x);
#endif
}
inline void stream_vec(double* p, Vec<double> x) {
#if defined(__AVX512F__)
  _mm512_stream_pd(p, x);
#elif defined(__AVX2__)
  _mm256_stream_pd(p, x);
#else
  store_vec(p, x);
#endif
}

inline void finish_streaming() {
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}

// Halves added to halves, with shuffles where the compiler has a short way to them.
template <class T>
inline T sum_lanes(Vec<T> x) {
  T lanes[kLanes<T>];
  store_vec<T>(lanes, x);
  for (int64_t half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}
#if defined(__AVX512F__)
template <>
inline float sum_lanes<float>(Vec<float> x) {
  return _mm512_reduce_add_ps(x);
}
template <>
inline double sum_lanes<double>(Vec<double> x) {
  return _mm512_reduce_add_pd(x);
}
#endif

// Number of vectors after which the kernel positions of the lanes repeat.
template <class T>
int64_t period_vectors(int64_t kernel) {
  int64_t a = kernel, b = kLanes<T>;
  while (b != 0) {
    int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return kernel / a;
}

template <class T>
T dot_plain(const T* w, const T* v, int64_t n) {
  Vec<T> sums[4] = {};
  int64_t x = 0;
  for (; x + 4 * kLanes<T> <= n; x += 4 * kLanes<T>) {
    for (int p = 0; p < 4; ++p) sums[p] += load_vec(w + x + p * kLanes<T>) * load_vec(v + x + p * kLanes<T>);
  }
  for (; x + kLanes<T> <= n; x += kLanes<T>) sums[0] += load_vec(w + x) * load_vec(v + x);
  T total = sum_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; x < n; ++x) total += w[x] * v[x];
  return total;
}

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
  for (int row = 0; row < R; ++row) {
    s[row] = s_sums[row][0];
    for (int c = 1; c < kChains; ++c) s[row] += s_sums[row][c];
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

template <class T, int R>
void dot_rows_of_period(const T* const* w, const T* v, const T* u, int64_t n, int64_t kernel, int64_t period,
                        int64_t done, const Vec<T>* s_sums, T* q_lanes, int64_t stride, T* s, T* q) {
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

// Rows whose running sums, P vectors each, fit into the registers together.
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
  dot_rows_of_period<T, R>(w, v, u, n, kernel, period, done, s_sums, q_lanes, stride, s, q);
}

template <class T, int P>
void dot_channel_major(const T* const* w, int64_t rows, const T* v, const T* u, int64_t n, int64_t kernel, T* q_lanes,
                       T* s, T* q) {
  constexpr int R = P == 0 ? 4 : rows_at_once(P);
  int64_t row = 0;
  for (; row + R <= rows; row += R) dot_some<T, P, R>(w + row, v, u, n, kernel, q_lanes, s + row, q + row * kernel);
  for (; row < rows; ++row) dot_some<T, P, 1>(w + row, v, u, n, kernel, q_lanes, s + row, q + row * kernel);
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
  switch (period_vectors<T>(kernel)) {
    case 1:
    case 2:
    case 4:
      return dot_channel_major<T, 4>(w, rows, v, u, n, kernel, scratch, s, q);
    case 3:
      return dot_channel_major<T, 3>(w, rows, v, u, n, kernel, scratch, s, q);
    case 5:
      return dot_channel_major<T, 5>(w, rows, v, u, n, kernel, scratch, s, q);
    case 7:
      return dot_channel_major<T, 7>(w, rows, v, u, n, kernel, scratch, s, q);
    case 9:
      return dot_channel_major<T, 9>(w, rows, v, u, n, kernel, scratch, s, q);
    default:
      return dot_channel_major<T, 0>(w, rows, v, u, n, kernel, scratch, s, q);
  }
}

// `repeated` receives `values` [kernel], from position `shift` on, again and again for one period of vectors, and
// less than a vector more; returns the period in elements.
template <class T>
int64_t repeat(const T* values, int64_t kernel, int64_t shift, T* repeated) {
  const int64_t period = period_vectors<T>(kernel) * kLanes<T>;
  for (int64_t k = 0; k < kernel; ++k) repeated[k] = values[k + shift < kernel ? k + shift : k + shift - kernel];
  // Vectors reach beyond the end of a repetition, into the beginning of the next, which is written later.
  for (int64_t first = (kernel - 1) / kLanes<T> * kLanes<T>; first >= 0; first -= kLanes<T>) {
    const Vec<T> some = load_vec(repeated + first);
    for (int64_t l = kernel; l < period; l += kernel) store_vec(repeated + l + first, some);
  }
  return period;
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
  int64_t period = 0;
  for (int row = 0; row < R; ++row) period = repeat(q + row * kernel, kernel, 0, scratch + row * stride);
  int64_t x = 0;
  for (; x + kLanes<T> <= n;) {
    for (int64_t p = 0; p < period && x + kLanes<T> <= n; p += kLanes<T>, x += kLanes<T>) {
      Vec<T> t_sum = load_vec(t + x), r_sum = load_vec(r + x);
      for (int row = 0; row < R; ++row) {
        if (ahead != 0) __builtin_prefetch(w[row] + x + ahead, 0, 2);
        const Vec<T> value = load_vec(w[row] + x);
        t_sum += s[row] * value;
        r_sum += load_vec(scratch + row * stride + p) * value;
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

// Calls body(x) on single columns until `out` is aligned and after the last whole vector, body_vec(x) on the vectors.
template <class T, class Single, class Whole>
inline void for_columns(const T* out, int64_t n, bool align, Single single, Whole whole) {
  int64_t x = 0;
  if (align) {
    for (; x < n && reinterpret_cast<uintptr_t>(out + x) % kVectorBytes != 0; ++x) single(x);
  }
  for (; x + kLanes<T> <= n; x += kLanes<T>) whole(x);
  for (; x < n; ++x) single(x);
}

template <class T>
void scale(const T* w, T factor, int64_t n, bool stream, T* out) {
  const auto single = [=](int64_t x) { out[x] = factor * w[x]; };
  if (stream) {
    for_columns(out, n, true, single, [=](int64_t x) { stream_vec(out + x, factor * load_vec(w + x)); });
  } else {
    for_columns(out, n, false, single, [=](int64_t x) { store_vec<T>(out + x, factor * load_vec(w + x)); });
  }
}

template <class T>
double inner(const T* a, const T* b, int64_t n) {
  constexpr int64_t kBlock = 4096;  // short enough that the rounding of a block's fp32 sum does not matter
  double total = 0;
  for (int64_t x = 0; x < n; x += kBlock) total += dot_plain(a + x, b + x, n - x < kBlock ? n - x : kBlock);
  return total;
}

template <class T>
double sum_of_squares(const T* x, int64_t n) {
  double sums[8] = {};
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    for (int l = 0; l < 8; ++l) sums[l] += double(x[j + l]) * double(x[j + l]);
  }
  for (; j < n; ++j) sums[0] += double(x[j]) * double(x[j]);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

template <class T>
void add(const T* x, int64_t n, T* sum) {
  for (int64_t j = 0; j < n; ++j) sum[j] += x[j];
}

template <class T>
void grad_row(const T* g, T factor, T a, const T* v, const T* b, const T* u, int64_t n, int64_t kernel,
              bool kernel_major, bool stream, T* scratch, T* out) {
  const int64_t channels = n / kernel;
  if (u == nullptr) {
    const auto single = [=](int64_t x) { out[x] = factor * g[x] - a * v[x]; };
    const auto value = [=](int64_t x) { return factor * load_vec(g + x) - a * load_vec(v + x); };
    if (stream) {
      for_columns(out, n, true, single, [=](int64_t x) { stream_vec(out + x, value(x)); });
    } else {
      for_columns(out, n, false, single, [=](int64_t x) { store_vec<T>(out + x, value(x)); });
    }
  } else if (kernel_major) {
    for (int64_t k = 0; k < kernel; ++k) {
      const int64_t first = k * channels;
      const T b_k = b[k];
      const auto single = [=](int64_t x) { out[first + x] = factor * g[first + x] - a * v[first + x] - b_k * u[x]; };
      for_columns(out, channels, false, single, [=](int64_t x) {
        store_vec<T>(out + first + x,
                     factor * load_vec(g + first + x) - a * load_vec(v + first + x) - b_k * load_vec(u + x));
      });
    }
  } else {
    // Lanes before the first aligned column shift the period; `repeated` starts at kernel position `shift`.
    int64_t shift = 0;
    while (stream && shift < n && reinterpret_cast<uintptr_t>(out + shift) % kVectorBytes != 0) ++shift;
    const auto single = [=](int64_t x) { out[x] = factor * g[x] - a * v[x] - b[x % kernel] * u[x]; };
    for (int64_t x = 0; x < shift; ++x) single(x);
    const int64_t period = repeat(b, kernel, shift % kernel, scratch);
    int64_t x = shift;
    while (x + kLanes<T> <= n) {
      for (int64_t p = 0; p < period && x + kLanes<T> <= n; p += kLanes<T>, x += kLanes<T>) {
        const Vec<T> value = factor * load_vec(g + x) - a * load_vec(v + x) - load_vec(scratch + p) * load_vec(u + x);
        if (stream) {
          stream_vec(out + x, value);
        } else {
          store_vec<T>(out + x, value);
        }
      }
    }
    for (; x < n; ++x) single(x);
  }
}

// Conversions between fp32 bits and the 16-bit types, free of branches so that the compiler vectorises them.
inline float bits_to_float(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
}

inline float from_bf16(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }

inline uint16_t to_bf16(float f) {
  const uint32_t bits = float_to_bits(f);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return uint16_t(f != f ? 0x7fc0u : rounded);
}

inline float from_f16(uint16_t h) {
  const uint32_t magnitude = (h & 0x7fffu) << 13;
  uint32_t bits = float_to_bits(bits_to_float(magnitude) * 0x1p112f);  // also right for subnormal numbers
  bits |= (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;                 // infinities and NaN
  return bits_to_float(bits | (uint32_t(h & 0x8000u) << 16));
}

inline uint16_t to_f16(float f) {
  const uint32_t bits = float_to_bits(f);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding a number 2^13 times the unit in the last place of the result makes the addition round to half precision.
  uint32_t exponent = magnitude & 0x7f800000u;
  exponent = exponent < 0x38800000u ? 0x38800000u : exponent;  // smaller ones are subnormal in half precision
  const float anchor = bits_to_float(exponent + (13u << 23));
  const uint32_t sum = float_to_bits(bits_to_float(magnitude) + anchor);
  const uint32_t half = ((exponent >> 13) - (112u << 10)) + (sum & 0x7fffffu) - 0x400u;
  const uint32_t finite = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  return uint16_t((magnitude > 0x7f800000u ? 0x7e00u : finite) | ((bits >> 16) & 0x8000u));
}

template <class T>
void load(const void* source, DType type, int64_t n, T* out) {
  switch (type) {
    case DType::f32:
      for (int64_t x = 0; x < n; ++x) out[x] = T(static_cast<const float*>(source)[x]);
      break;
    case DType::f64:
      for (int64_t x = 0; x < n; ++x) out[x] = T(static_cast<const double*>(source)[x]);
      break;
    case DType::bf16:
      for (int64_t x = 0; x < n; ++x) out[x] = T(from_bf16(static_cast<const uint16_t*>(source)[x]));
      break;
    case DType::f16:
      for (int64_t x = 0; x < n; ++x) out[x] = T(from_f16(static_cast<const uint16_t*>(source)[x]));
      break;
  }
}

template <class T>
void store(const T* source, int64_t n, DType type, void* out) {
  switch (type) {
    case DType::f32:
      for (int64_t x = 0; x < n; ++x) static_cast<float*>(out)[x] = float(source[x]);
      break;
    case DType::f64:
      for (int64_t x = 0; x < n; ++x) static_cast<double*>(out)[x] = double(source[x]);
      break;
    case DType::bf16:
      for (int64_t x = 0; x < n; ++x) static_cast<uint16_t*>(out)[x] = to_bf16(float(source[x]));
      break;
    case DType::f16:
      for (int64_t x = 0; x < n; ++x) static_cast<uint16_t*>(out)[x] = to_f16(float(source[x]));
      break;
  }
}

template <class T>
constexpr Kernels<T> kTable = {dot_rows<T>, add_rows<T>, scale<T>, inner<T>, sum_of_squares<T>,
                               add<T>,      grad_row<T>, load<T>,  store<T>, finish_streaming};

}  // namespace

const Kernels<float>& kernels_f32() { return kTable<float>; }
const Kernels<double>& kernels_f64() { return kTable<double>; }

}  // namespace bssn::cpu::BSSN_ISA
