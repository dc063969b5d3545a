// The inner loop of the hash, for kernels.cpp alone.
#pragma once

#include "kernels.h"
#include "vectors.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace bssn::cpu::BSSN_ISA {
namespace {

typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint64_t WordsInMemory __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));

// x * kHashMultiplier, which has 32 bits: two products of 32 bits are faster than one of 64.
inline Words times_multiplier(Words x) {
#if defined(__AVX512F__)
  const __m512i m = _mm512_set1_epi64(kHashMultiplier);
  const __m512i high = _mm512_mul_epu32(_mm512_shuffle_epi32(__m512i(x), _MM_PERM_DDBB), m);
  return Words(_mm512_mul_epu32(__m512i(x), m)) + Words(_mm512_slli_epi64(high, 32));
#elif defined(__AVX2__)
  const __m256i m = _mm256_set1_epi64x(kHashMultiplier);
  const __m256i high = _mm256_mul_epu32(_mm256_shuffle_epi32(__m256i(x), 0xf5), m);
  return Words(_mm256_mul_epu32(__m256i(x), m)) + Words(_mm256_slli_epi64(high, 32));
#elif defined(__SSE2__)
  const __m128i m = _mm_set1_epi64x(kHashMultiplier);
  const __m128i high = _mm_mul_epu32(_mm_shuffle_epi32(__m128i(x), 0xf5), m);
  return Words(_mm_mul_epu32(__m128i(x), m)) + Words(_mm_slli_epi64(high, 32));
#else
  return x * kHashMultiplier;
#endif
}

}  // namespace

// Each step is a bijection of the word for a given state, and of the state for a given word: a single other word leaves
// another state for certain. The shift comes before the product, or a change of a word's highest bit, a sign, would
// change that bit of the state alone, and a second sign would take it back. By 29 the signs of a word's numbers, of
// whatever size, meet neither each other nor the highest bit.
void hash_stripes(const unsigned char* data, int64_t stripes, uint64_t* lanes) {
  constexpr int kVectors = kHashStripe / kVectorBytes;
  constexpr int64_t kWords = kVectorBytes / 8;
  Words state[kVectors];
  for (int i = 0; i < kVectors; ++i) state[i] = *reinterpret_cast<const WordsInMemory*>(lanes + i * kWords);
  for (const unsigned char* end = data + stripes * kHashStripe; data != end; data += kHashStripe) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      const Words x = state[i] ^ *reinterpret_cast<const WordsInMemory*>(data + i * kVectorBytes);
      state[i] = times_multiplier(x ^ (x >> 29));
    }
  }
  for (int i = 0; i < kVectors; ++i) *reinterpret_cast<WordsInMemory*>(lanes + i * kWords) = state[i];
}

}  // namespace bssn::cpu::BSSN_ISA
