// Loads and stores of what is not needed again: it leaves the second-level cache first, and what will be read again
// stays.
#pragma once

#include "portable.h"

namespace bssn::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
__device__ __forceinline__ uint64_t leaves_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
#endif

// The memory must be the same throughout the kernel.
template <class P>
BSSN_HD P load_streaming(const P* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  P value;
  if constexpr (sizeof(P) == 16) {
    asm("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
        : "=r"(value.words[0]), "=r"(value.words[1]), "=r"(value.words[2]), "=r"(value.words[3])
        : "l"(from), "l"(leaves_first()));
  } else {
    asm("ld.global.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;"
        : "=r"(value.words[0]), "=r"(value.words[1])
        : "l"(from), "l"(leaves_first()));
  }
  return value;
#else
  return load_once(from);
#endif
}

template <class P>
BSSN_HD void store_streaming(P* to, const P& value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(P) == 16) {
    asm volatile("st.global.L1::no_allocate.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to),
                 "r"(value.words[0]), "r"(value.words[1]), "r"(value.words[2]), "r"(value.words[3]), "l"(leaves_first())
                 : "memory");
  } else {
    asm volatile("st.global.L1::no_allocate.L2::cache_hint.v2.u32 [%0], {%1, %2}, %3;" ::"l"(to), "r"(value.words[0]),
                 "r"(value.words[1]), "l"(leaves_first())
                 : "memory");
  }
#else
  store_once(to, value);
#endif
}

}  // namespace bssn::cuda
