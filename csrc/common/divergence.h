// The renormalised reverse KL of one row and its entry gradients, the formulas in scalar form.
//
//   p = softmax(z / T),  q = softmax(t / T'),  l = log p - log q      over the present entries
//   L = sum p l,         dL/dz = p (l - L) / T
//
// Traps handled here, once: differences are taken before dividing by T, so that a tiny T cannot make
// inf - inf; logs and gradients are kept finite, so that an overflowing span never makes NaN, not
// where repeated ids add up either; p = 0 gives exactly 0 whatever l is.
#pragma once

#include <cfloat>
#include <cmath>

#include "formats.h"

namespace opd {

// log p of an entry far below the maximum may overflow to -inf; NaN goes through.
OPD_HD inline float finite_log(float log_p) { return log_p < -FLT_MAX ? -FLT_MAX : log_p; }

// NaN or +inf at an entry that takes part makes its row NaN.
OPD_HD inline bool poisons(float student, float teacher) {
  return !(student < INFINITY) || !(teacher < INFINITY);
}

OPD_HD inline float entry_loss(float p, float log_ratio) { return p == 0 ? 0.0f : p * log_ratio; }

// Of one entry, or of several that share an id.
OPD_HD inline float finite_gradient(double value) {
  return value > FLT_MAX ? FLT_MAX : value < -FLT_MAX ? -FLT_MAX : static_cast<float>(value);
}

OPD_HD inline float entry_gradient(float p, float log_ratio, float loss, float temperature) {
  if (p == 0) return 0.0f;
  const float value = p * (log_ratio - loss) / temperature;
  return value > FLT_MAX ? FLT_MAX : value < -FLT_MAX ? -FLT_MAX : value;
}

}  // namespace opd
