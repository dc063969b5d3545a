// From the lengths of one direction's raw vectors to its unit vectors and sigma.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

namespace bssn::cpu {

// What one direction's iteration multiplies its two raw vectors with, and its sigma.
struct Direction {
  bool usable;
  double first_factor, second_factor, sigma;

  // first, second: |s|, |t| or |q|, |r|. With u = s / max(|s|, eps) and v = W^T u / max(|W^T u|, eps),
  // sigma = u W v = |W^T u|^2 / max(|W^T u|, eps), and |W^T u| = |t| / max(|s|, eps).
  Direction(double first, double second, double eps) {
    const bool finite = std::isfinite(first) && std::isfinite(second);
    usable = finite && first > 0 && second > 0;
    first_factor = 1 / std::max(first, eps);
    const double length = second * first_factor;
    second_factor = first_factor / std::max(length, eps);
    sigma = usable ? length * length / std::max(length, eps) : (finite ? 0 : std::numeric_limits<double>::quiet_NaN());
  }
};

}  // namespace bssn::cpu
