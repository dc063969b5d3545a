// What a weight is multiplied by, as a function of its sigma: see bssn_fast/laws.py.
#pragma once

#include <cstdint>

namespace bssn {

enum class LawKind : int64_t {
  constant = 0,  // number / sigma
  at_most = 1,   // min(1, number / sigma)
  gain = 2,      // gamma / sigma
};

// As Python fills it in.
struct Law {
  double number;
  LawKind kind;
};

static_assert(sizeof(Law) == 2 * sizeof(int64_t), "Python fills a law as 2 integers");

}  // namespace bssn
