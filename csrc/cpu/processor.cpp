// What the processor can do: instruction sets and cache size.
#include <algorithm>
#include <cstring>

#ifdef __linux__
#include <unistd.h>
#endif

#include "cpu.h"
#include "rows.h"

namespace bssn::cpu {
namespace {

struct InstructionSet {
  const char* name;
  bool (*supported)();
  const Kernels<float>& (*f32)();
  const Kernels<double>& (*f64)();
  HashStripes hash;
};

const InstructionSet kSets[] = {
#ifdef BSSN_ISA_LIST_X86
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     },
     avx512::kernels_f32, avx512::kernels_f64, avx512::hash_stripes},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2::kernels_f32,
     avx2::kernels_f64, avx2::hash_stripes},
#endif
    {"portable", [] { return true; }, portable::kernels_f32, portable::kernels_f64, portable::hash_stripes},
};

const InstructionSet* best() {
  for (const InstructionSet& set : kSets) {
    if (set.supported()) return &set;
  }
  return nullptr;  // unreachable: the portable one is always supported
}

const InstructionSet* in_use = best();

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return in_use->f32();
}
template <>
const Kernels<double>& kernels<double>() {
  return in_use->f64();
}

HashStripes hash_stripes() { return in_use->hash; }

const char* instruction_set() { return in_use->name; }

bool set_instruction_set(const char* name) {
  for (const InstructionSet& set : kSets) {
    if (std::strcmp(set.name, name) == 0 && set.supported()) {
      in_use = &set;
      return true;
    }
  }
  return false;
}

int64_t last_level_cache() {
#ifdef _SC_LEVEL3_CACHE_SIZE
  static const int64_t size = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (size > 0) return size;
#endif
  return int64_t(32) << 20;
}

int64_t half_second_level_cache() {
  int64_t size = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  size = found;
#endif
  return std::clamp(size / 2, int64_t(512) << 10, int64_t(1) << 20);
}

// A virtual machine is told the whole of a cache that it shares with others, some of them hundreds of megabytes.
bool exceeds_last_level_cache(int64_t bytes) { return bytes > std::min(last_level_cache(), int64_t(32) << 20); }

}  // namespace bssn::cpu
