// The renormalised reverse KL of one row and its entry gradients, the formulas in scalar form.
//
//   p = softmax(z / T),  q = softmax(t / T'),  l = log p - log q      over the present entries
//   L = sum p l,         dL/dz = p (l - L) / T
//
// Traps handled here, once: differences are taken before dividing by T, so that a tiny T cannot make
// inf - inf; log q is kept finite, so that an overflowing span gives inf and never NaN; p = 0 gives
// exactly 0 whatever l is.
#pragma once

#include <cfloat>
#include <cmath>

#include "formats.h"

namespace opd {

// log softmax of one entry, kept finite: x and max are logits, log_sum belongs to (x - max) / T.
OPD_HD inline float log_softmax(float x, float max, float temperature, float log_sum) {
  const float value = (x - max) / temperature - log_sum;
  return value < -FLT_MAX ? -FLT_MAX : value;  // lets NaN through
}

// NaN or +inf at an entry that takes part makes its row NaN.
OPD_HD inline bool poisons(float student, float teacher) {
  return !(student < INFINITY) || !(teacher < INFINITY);
}

OPD_HD inline float entry_loss(float p, float log_ratio) { return p == 0 ? 0.0f : p * log_ratio; }

OPD_HD inline float entry_gradient(float p, float log_ratio, float loss, float temperature) {
  return p == 0 ? 0.0f : p * (log_ratio - loss) / temperature;
}

}  // namespace opd
