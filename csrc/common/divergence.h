// The renormalised reverse KL of one row and its entry gradients, the formulas in scalar form.
//
//   p = softmax(z / T),  q = softmax(t / T'),  l = log p - log q      over the present entries
//   L = sum p l,         dL/dz = p (l - L) / T
//
// Late in training p is nearly q, and l is the whole signal. So l is not computed as the difference
// of two rounded logarithms. With s = (z - max z) / T, u = (t - max t) / T' and d = s - u,
//
//   l = d - log(sum e^s / sum e^u)    and    sum e^s / sum e^u = 1 + sum e^u (e^d - 1) / sum e^u
//
// d comes from differences in double. e^d - 1 comes from a polynomial where d is small, and the
// logarithm from log1p where the two sums are close. Equal models have loss and gradient 0.
//
// Traps that are handled here, once:
// - Differences are taken before dividing by T, so a tiny T cannot make inf - inf.
// - Log ratios and gradients stay finite, so an overflowing span never makes NaN, even where the
//   gradients of repeated ids are added.
// - p = 0 gives exactly 0, whatever l is.
#pragma once

#include <cfloat>
#include <cmath>

#include "formats.h"

namespace opd {

// Rounds to float; infinities become the largest floats, NaN stays NaN.
OPD_HD inline float finite(double value) {
  const double above = value < -FLT_MAX ? -FLT_MAX : value;
  return static_cast<float>(above > FLT_MAX ? FLT_MAX : above);
}

// Whether an entry makes its row NaN: student or teacher is NaN or +inf.
OPD_HD inline bool poisons(float student, float teacher) {
  return !(student < INFINITY) || !(teacher < INFINITY);
}

// 1 / T to the last bits of a double, without a division, for which GPUs call a subroutine.
OPD_HD inline double reciprocal(float temperature) {
  double value = 1 / temperature;
  for (int step = 0; step < 2; ++step) value += value * (1 - temperature * value);
  return value;
}

// Computes d for the entries of a row.
struct Difference {
  float student_max, teacher_max;
  double student_factor, teacher_factor;

  OPD_HD Difference(float student_max, float teacher_max, float temperature,
                    float teacher_temperature)
      : student_max(student_max),
        teacher_max(teacher_max),
        student_factor(reciprocal(temperature)),
        teacher_factor(reciprocal(teacher_temperature)) {}

  OPD_HD float of(float student, float teacher) const {
    return finite((static_cast<double>(student) - student_max) * student_factor -
                  (static_cast<double>(teacher) - teacher_max) * teacher_factor);
  }
};

// e^s - e^u = e^u (e^d - 1), without cancellation where d is small.
OPD_HD inline float exp_change(float exp_student, float exp_teacher, float d) {
  // (e^d - 1 - d) / d^2 for |d| <= 1/2; e^d - 1 then has a relative error of 3e-9.
  float rest = 1.9991810e-4f;
  rest = rest * d + 1.39974931e-3f;
  rest = rest * d + 8.33307672e-3f;
  rest = rest * d + 4.16653156e-2f;
  rest = rest * d + 1.66666687e-1f;
  rest = rest * d + 5.00000060e-1f;
  const float small = exp_teacher * (d + d * d * rest);
  return fabsf(d) <= 0.5f ? small : exp_student - exp_teacher;
}

// log(student / teacher) of two sums. `change` is their difference, summed term by term, and `size`
// the sum of these terms' absolute values.
OPD_HD inline float log_of_ratio(float student, float teacher, float change, float size) {
  return size < 0.25f * teacher ? log1pf(change / teacher) : logf(student) - logf(teacher);
}

OPD_HD inline float entry_loss(float p, float log_ratio) { return p == 0 ? 0.0f : p * log_ratio; }

OPD_HD inline float entry_gradient(float p, float log_ratio, float loss, float temperature) {
  return p == 0 ? 0.0f : finite(p * (log_ratio - loss) / temperature);
}

}  // namespace opd
