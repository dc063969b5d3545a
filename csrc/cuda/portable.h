// What lets one source serve as the kernels' code under nvcc and as ordinary C++ under any compiler: the arithmetic is
// tested without a GPU by running the same functions block after block on the CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "layer.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define BSSN_HD __host__ __device__ __forceinline__
#define BSSN_UNROLL _Pragma("unroll")
#define BSSN_PRAGMA(text) _Pragma(#text)
#define BSSN_UNROLL_BY(n) BSSN_PRAGMA(unroll n)
#else
#define BSSN_HD inline
#define BSSN_UNROLL
#define BSSN_UNROLL_BY(n)
#endif

namespace bssn::cuda {

// Storage of the two half precisions; arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

BSSN_HD uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

BSSN_HD float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// Returns x. What is computed from the result is computed here, not once before the loop around it, which would keep it
// in registers all the while.
BSSN_HD int not_before_here(int x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

BSSN_HD float to_float(float x) { return x; }

BSSN_HD float to_float(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }

BSSN_HD float to_float(Float16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31u, mantissa = x.bits & 1023u;
  if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
  const float size =
      exponent == 0 ? std::ldexp(float(mantissa), -24) : std::ldexp(float(mantissa + 1024u), int(exponent) - 25);
  return sign ? -size : size;
#endif
}

BSSN_HD void from_float(float x, float& out) { out = x; }

BSSN_HD void from_float(float x, BFloat16& out) {
#ifdef __CUDA_ARCH__
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = bits_of(x);
  out.bits = x != x ? 0x7fff : uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#endif
}

BSSN_HD void from_float(float x, Float16& out) {
#ifdef __CUDA_ARCH__
  out.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint16_t sign = uint16_t(bits_of(x) >> 16 & 0x8000u);
  const float size = std::fabs(x);
  if (x != x) {
    out.bits = 0x7fff;
  } else if (size >= 65520.0f) {
    out.bits = uint16_t(sign | 0x7c00u);
  } else if (size < 6.103515625e-05f) {  // subnormal: multiples of 2^-24
    out.bits = uint16_t(sign | uint16_t(std::nearbyint(std::ldexp(size, 24))));
  } else {
    const uint32_t bits = bits_of(size);
    out.bits = uint16_t(sign | uint16_t((bits + 0xfffu + (bits >> 13 & 1u) - 0x38000000u) >> 13));
  }
#endif
}

// Calls f with a zero of an element type that is known only when the kernel runs.
template <class F>
BSSN_HD void with_element_type(int32_t type, F f) {
  if (type == int32_t(DType::f32)) {
    f(float{});
  } else if (type == int32_t(DType::bf16)) {
    f(BFloat16{});
  } else {
    f(Float16{});
  }
}

// V neighbouring elements, moved as one. Half precisions lie in words, as they do in the GPU's registers.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  static constexpr int kWords = int(sizeof(T)) * V / 4;
  uint32_t words[kWords];

  BSSN_HD float get(int j) const {
    if constexpr (sizeof(T) == 4) {
      return float_of(words[j]);
    } else {
      return to_float(T{uint16_t(j % 2 ? words[j / 2] >> 16 : words[j / 2] & 0xffffu)});
    }
  }

  // In order: j = 0, 1, ...
  BSSN_HD void set(int j, float value) {
    if constexpr (sizeof(T) == 4) {
      words[j] = bits_of(value);
    } else {
      T element;
      from_float(value, element);
      words[j / 2] = j % 2 ? words[j / 2] | uint32_t(element.bits) << 16 : element.bits;
    }
  }
};

template <class T>
BSSN_HD bool is_aligned(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % alignof(T) == 0;
}

// Writes what is not read again soon: it leaves the caches first.
template <class P>
BSSN_HD void store_once(P* to, const P& value) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(P) == 16) {
    __stcs(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4&>(value));
    return;
  } else if constexpr (sizeof(P) == 8) {
    __stcs(reinterpret_cast<uint2*>(to), reinterpret_cast<const uint2&>(value));
    return;
  }
#endif
  *to = value;
}

// The same for reading.
template <class P>
BSSN_HD P load_once(const P* from) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(P) == 16) {
    const uint4 words = __ldcs(reinterpret_cast<const uint4*>(from));
    return reinterpret_cast<const P&>(words);
  } else if constexpr (sizeof(P) == 8) {
    const uint2 words = __ldcs(reinterpret_cast<const uint2*>(from));
    return reinterpret_cast<const P&>(words);
  }
#endif
  return *from;
}

// The lesser of two. Loads beyond the end of a tile repeat the last piece instead of being left out: a register array
// that is written only under a condition is kept alive by the compiler through the whole kernel.
BSSN_HD uint32_t lesser(uint32_t a, uint32_t b) { return a < b ? a : b; }

// On the CPU. Tests have another in its place, which lets copies take a while.
#ifndef BSSN_HOST_COPY
#define BSSN_HOST_COPY(to, from, bytes) std::memcpy(to, from, bytes)
#endif

// Copies 16 bytes into shared memory; where the chip can, without waiting for them: see Block::wait_for_copies.
BSSN_HD void copy16(void* shared, const void* global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const uint32_t address = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#elif defined(__CUDA_ARCH__)
  struct alignas(16) Bytes {
    uint32_t words[4];
  };
  *static_cast<Bytes*>(shared) = *static_cast<const Bytes*>(global);
#else
  BSSN_HOST_COPY(shared, global, 16);
#endif
}

// Copies an element into shared memory; those of 4 bytes as copy16 does.
template <class W>
BSSN_HD void copy_element(W* shared, const W* global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(W) == 4) {
    const uint32_t address = uint32_t(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(global) : "memory");
    return;
  }
#elif !defined(__CUDA_ARCH__)
  if constexpr (sizeof(W) == 4) {
    BSSN_HOST_COPY(shared, global, 4);
    return;
  }
#endif
  *shared = *global;
}

// Division of numbers below 2^31 by a number that a whole layer shares.
struct Divisor {
  uint32_t value, factor, shift;

  BSSN_HD uint32_t operator()(uint32_t x) const {
    return value == 1 ? x : uint32_t(uint64_t(x) * factor >> 32) >> shift;
  }
};

inline Divisor divisor(int64_t value) {
  uint32_t shift = 0;
  while (int64_t(2) << shift < value) ++shift;  // 2^shift < value <= 2^(shift + 1)
  const uint64_t numerator = uint64_t(1) << (32 + shift);
  return {uint32_t(value), uint32_t((numerator + value - 1) / value), shift};
}

}  // namespace bssn::cuda
