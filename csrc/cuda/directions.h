// From sums to sigma: what reference.py does with norms and dot products, for one layer.
#pragma once

#include "forward_args.h"

namespace bssn::cuda {

struct Direction {
  double sigma;
  float first_factor, second_factor;  // of the raw s and t, or q and r
  bool usable;
};

BSSN_HD bool finite(double x) { return x - x == 0.0; }

// first2, second2: squared norms of s and t (q and r); stored: the product of s (q) with the stored vector u_out
// (v_in). With u = s / max(|s|, eps), v = W^T u / max(|W^T u|, eps) and |W^T u| = |t| / max(|s|, eps), sigma = u W v =
// |W^T u|^2 / max(|W^T u|, eps).
BSSN_HD Direction direction(double first2, double second2, double stored, double eps, bool update) {
  Direction d = {stored, 0.0f, 0.0f, false};
  if (!update || !finite(first2) || !finite(second2) || first2 <= 0.0 || second2 <= 0.0) return d;
  const double first_factor = 1.0 / fmax(sqrt(first2), eps);
  const double length = sqrt(second2) * first_factor, divisor = fmax(length, eps);
  d.sigma = length * length / divisor;
  d.first_factor = float(first_factor);
  d.second_factor = float(first_factor / divisor);
  d.usable = true;
  return d;
}

// sums: s s, u_out s, q q, v_in q, t t, r r. Writes the layer's sigma.
BSSN_HD Record record_of(const ForwardCall& call, const ForwardLayer& layer, const double* sums) {
  const Direction out_side = direction(sums[0], sums[4], sums[1], call.eps, call.update);
  double sigma = out_side.sigma;
  Record record = {};
  record.factors[0] = out_side.first_factor;
  record.factors[1] = out_side.second_factor;
  record.usable[0] = out_side.usable;
  if (layer.two_sided()) {
    const Direction in_side = direction(sums[2], sums[5], sums[3], call.eps, call.update);
    sigma = (sigma + in_side.sigma) / 2;
    record.factors[2] = in_side.second_factor;
    record.factors[3] = in_side.first_factor;
    record.usable[1] = in_side.usable;
  }
  const float rounded = float(sigma);
  const float written = finite(rounded) ? rounded : float_of(0x7fc00000u);  // NaN
  call.sigmas[layer.position] = written;
  record.multiplier = multiplier(layer.number, layer.law, written);
  return record;
}

}  // namespace bssn::cuda
