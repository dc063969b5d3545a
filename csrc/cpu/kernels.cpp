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

template <class T>
inline T sum_lanes(Vec<T> x) {
  T sum = 0;
  for (int64_t l = 0; l < kLanes<T>; ++l) sum += x[l];
  return sum;
}

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

// The whole periods of a channel-major row, with P (a multiple of the period) vectors of running sums in registers.
// Returns the number of columns done.
template <class T, int P>
int64_t dot_periods(const T* w, const T* v, const T* u, int64_t n, Vec<T>& s, T* q_lanes) {
  Vec<T> s_sums[4] = {};
  Vec<T> q_sums[P] = {};
  int64_t x = 0;
  for (; x + P * kLanes<T> <= n; x += P * kLanes<T>) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const Vec<T> value = load_vec(w + x + p * kLanes<T>);
      s_sums[p % 4] += value * load_vec(v + x + p * kLanes<T>);
      q_sums[p] += value * load_vec(u + x + p * kLanes<T>);
    }
  }
  s = (s_sums[0] + s_sums[1]) + (s_sums[2] + s_sums[3]);
  for (int p = 0; p < P; ++p) store_vec(q_lanes + p * kLanes<T>, q_sums[p]);
  return x;
}

// The same for long periods: the running sums stay in memory (the first-level cache).
template <class T>
int64_t dot_long_periods(const T* w, const T* v, const T* u, int64_t n, int64_t period, Vec<T>& s, T* q_lanes) {
  s = Vec<T>{};
  for (int64_t l = 0; l < period * kLanes<T>; ++l) q_lanes[l] = 0;
  int64_t x = 0;
  for (; x + period * kLanes<T> <= n; x += period * kLanes<T>) {
    for (int64_t p = 0; p < period * kLanes<T>; p += kLanes<T>) {
      const Vec<T> value = load_vec(w + x + p);
      s += value * load_vec(v + x + p);
      store_vec<T>(q_lanes + p, load_vec(q_lanes + p) + value * load_vec(u + x + p));
    }
  }
  return x;
}

template <class T>
void dot_channel_major(const T* w, const T* v, const T* u, int64_t n, int64_t kernel, T* q_lanes, T* s, T* q) {
  int64_t period = period_vectors<T>(kernel);
  Vec<T> s_sum;
  int64_t x;
  if (period == 1 || period == 2 || period == 4) {
    period = 4;
    x = dot_periods<T, 4>(w, v, u, n, s_sum, q_lanes);
  } else if (period == 3) {
    period = 6;
    x = dot_periods<T, 6>(w, v, u, n, s_sum, q_lanes);
  } else if (period == 5) {
    x = dot_periods<T, 5>(w, v, u, n, s_sum, q_lanes);
  } else if (period == 7) {
    x = dot_periods<T, 7>(w, v, u, n, s_sum, q_lanes);
  } else if (period == 9) {
    x = dot_periods<T, 9>(w, v, u, n, s_sum, q_lanes);
  } else {
    x = dot_long_periods<T>(w, v, u, n, period, s_sum, q_lanes);
  }
  for (int64_t p = 0; x + kLanes<T> <= n; x += kLanes<T>, p += kLanes<T>) {
    const Vec<T> value = load_vec(w + x);
    s_sum += value * load_vec(v + x);
    store_vec<T>(q_lanes + p, load_vec(q_lanes + p) + value * load_vec(u + x));
  }
  for (int64_t k = 0; k < kernel; ++k) q[k] = q_lanes[k];
  for (int64_t l = kernel; l < period * kLanes<T>; l += kernel) {
    for (int64_t k = 0; k < kernel; ++k) q[k] += q_lanes[l + k];
  }
  T total = sum_lanes<T>(s_sum);
  for (int64_t k = x % kernel; x < n; ++x) {
    total += w[x] * v[x];
    q[k] += w[x] * u[x];
    if (++k == kernel) k = 0;
  }
  *s = total;
}

template <class T>
void dot(const T* w, const T* v, const T* u, int64_t n, int64_t kernel, bool kernel_major, T* scratch, T* s, T* q) {
  if (q == nullptr) {
    *s = dot_plain(w, v, n);
  } else if (kernel_major) {
    const int64_t channels = n / kernel;
    T total = 0;
    for (int64_t k = 0; k < kernel; ++k) {
      total += dot_plain(w + k * channels, v + k * channels, channels);
      q[k] = dot_plain(w + k * channels, u, channels);
    }
    *s = total;
  } else {
    dot_channel_major(w, v, u, n, kernel, scratch, s, q);
  }
}

// `repeated` receives `values` [kernel] again and again, for one period of vectors; returns the period in elements.
template <class T>
int64_t repeat(const T* values, int64_t kernel, T* repeated) {
  const int64_t period = period_vectors<T>(kernel) * kLanes<T>;
  for (int64_t l = 0; l < period; l += kernel) {
    for (int64_t k = 0; k < kernel; ++k) repeated[l + k] = values[k];
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
  for (int row = 0; row < R; ++row) period = repeat(q + row * kernel, kernel, scratch + row * stride);
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
    const int64_t period = period_vectors<T>(kernel) * kLanes<T>;
    for (int64_t l = 0, k = shift % kernel; l < period; ++l) {
      scratch[l] = b[k];
      if (++k == kernel) k = 0;
    }
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
constexpr Kernels<T> kTable = {dot<T>, add_rows<T>, scale<T>, inner<T>, sum_of_squares<T>,
                               add<T>, grad_row<T>, load<T>,  store<T>, finish_streaming};

}  // namespace

const Kernels<float>& kernels_f32() { return kTable<float>; }
const Kernels<double>& kernels_f64() { return kTable<double>; }

}  // namespace bssn::cpu::BSSN_ISA
