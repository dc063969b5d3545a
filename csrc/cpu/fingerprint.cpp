#include <cstring>

#include "cpu.h"

namespace bssn::cpu {

uint64_t fingerprint(const Sample* samples, int64_t n) {
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a, a whole element at a time
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t x = 0; x < samples[j].count; ++x) {
      uint64_t element = 0;
      std::memcpy(&element, samples[j].first + x * samples[j].stride, size_t(samples[j].element_size));
      hash = (hash ^ element) * 0x100000001b3u;
      hash ^= hash >> 29;
    }
  }
  return hash;
}

}  // namespace bssn::cpu
