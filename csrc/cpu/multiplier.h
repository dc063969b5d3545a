// What a weight is multiplied by: `multiplier` of reference.py.
#pragma once

#include "../layer.h"

namespace bssn::cpu {

// Whether a bound leaves the weight as it is. Decided by sigma as it is written, in both directions.
template <class T>
bool is_slack(const Layer& layer, double sigma) {
  return layer.law.kind == LawKind::at_most && T(sigma) <= T(layer.law.number);
}

template <class T>
double multiplier(const Layer& layer, double sigma) {
  if (is_slack<T>(layer, sigma)) return 1;
  const bool learned = layer.law.kind == LawKind::gain;
  const double number = learned ? double(*static_cast<const T*>(layer.gain)) : layer.law.number;
  return T(sigma) == 0 ? 0 : number / sigma;
}

}  // namespace bssn::cpu
