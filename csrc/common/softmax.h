// A gradient's background, factor exp(z / T - logsumexp), in the form that a row is computed from.
#pragma once

#include "divergence.h"

namespace opd {

// factor exp(z / T - logsumexp) = scale exp((z - middle) / T). `middle` is near T logsumexp:
// however small T is, the difference is exact where it matters, and scale / factor is between 1 / V
// and V.
struct Softmax {
  float middle;
  float temperature;
  float scale;
};

// Whether a row has a background; where it has none its logits are not read.
OPD_HD inline bool has_background(float upstream, float factor) {
  return factor != 0 && upstream * factor != 0;
}

OPD_HD inline Softmax softmax_of(float upstream, float factor, double logsumexp,
                                 float temperature) {
  const float middle = finite(logsumexp * temperature);
  const double rest = logsumexp - middle / static_cast<double>(temperature);
  double scale = static_cast<double>(upstream) * factor * exp(-rest);
  // Of finite values it stays finite, so that a p of 0 gives 0.
  if (fabsf(upstream) <= FLT_MAX && fabsf(factor) <= FLT_MAX) scale = finite(scale);
  return {middle, temperature, static_cast<float>(scale)};
}

}  // namespace opd
