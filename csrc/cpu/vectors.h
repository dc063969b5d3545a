// Vectors of the instruction set that BSSN_ISA names, by the vector extensions of GCC and Clang.
#pragma once

#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__)
// GCC 12 takes the undefined values of its own header for mistakes (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
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

// sum_x w[x] v[x]
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

}  // namespace
}  // namespace bssn::cpu::BSSN_ISA
