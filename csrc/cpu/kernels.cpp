// Inner loops, written with the vector extensions of GCC and Clang and compiled once for each instruction set
// (BSSN_ISA). Includes no standard header with inline functions: the linker could keep this file's AVX-512 copy of one
// for the whole program.
#include "kernels.h"

#include "power.h"
#include "stripes.h"
#include "vectors.h"

namespace bssn::cpu::BSSN_ISA {
namespace {

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
    repeat(b, kernel, shift % kernel, period, scratch);
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
constexpr Kernels<T> kTable = {dot_rows<T>, add_rows<T>, step<T>, scale<T>, inner<T>,        sum_of_squares<T>,
                               add<T>,      grad_row<T>, load<T>, store<T>, finish_streaming};

}  // namespace

const Kernels<float>& kernels_f32() { return kTable<float>; }
const Kernels<double>& kernels_f64() { return kTable<double>; }

}  // namespace bssn::cpu::BSSN_ISA
