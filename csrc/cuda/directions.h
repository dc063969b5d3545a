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

// Of one side: 0 out, 1 in. sums: s s, u_out s, q q, v_in q, t t, r r.
BSSN_HD Direction direction_of(const ForwardCall& call, const double* sums, int side) {
  return direction(sums[2 * side], sums[4 + side], sums[2 * side + 1], call.eps, call.update);
}

// What the write phase needs to know; and the layer's sigma.
BSSN_HD Record record_of(const ForwardLayer& layer, const Direction* sides, float& sigma_out) {
  double sigma = sides[0].sigma;
  Record record = {};
  record.factors[0] = sides[0].first_factor;
  record.factors[1] = sides[0].second_factor;
  record.usable[0] = sides[0].usable;
  if (layer.two_sided()) {
    sigma = (sigma + sides[1].sigma) / 2;
    record.factors[2] = sides[1].second_factor;
    record.factors[3] = sides[1].first_factor;
    record.usable[1] = sides[1].usable;
  }
  const float rounded = float(sigma);
  sigma_out = finite(rounded) ? rounded : float_of(0x7fc00000u);  // NaN
  record.multiplier = multiplier(layer.number, layer.law, sigma_out);
  return record;
}

}  // namespace bssn::cuda
