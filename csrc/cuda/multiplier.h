// What a weight is multiplied by: `multiplier` of reference.py.
#pragma once

#include "../law.h"
#include "portable.h"

namespace bssn::cuda {

// A layer's law as kernels are told it; the kind, a LawKind, says which of the two it is.
union LawNumber {
  double constant;
  const float* gain;
};

// Whether a bound leaves the weight as it is. Decided by sigma as it is written, in both directions.
BSSN_HD bool is_slack(const LawNumber& number, uint8_t kind, float sigma) {
  return LawKind(kind) == LawKind::at_most && sigma <= float(number.constant);
}

BSSN_HD float multiplier(const LawNumber& number, uint8_t kind, float sigma) {
  if (is_slack(number, kind, sigma)) return 1.0f;
  const float dividend = LawKind(kind) == LawKind::gain ? *number.gain : float(number.constant);
  return sigma == 0.0f ? 0.0f : dividend / sigma;
}

}  // namespace bssn::cuda
