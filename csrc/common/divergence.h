// The renormalised reverse KL of one row and its entry gradients, for CPUs and GPUs.
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

#include "arguments.h"
#include "values.h"

namespace opd {

// The larger of two floats, neither NaN.
OPD_HD inline float larger(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fmaxf(a, b);
#else
  return b > a ? b : a;
#endif
}

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

// The entries of a row. -1 is an absent id.
struct Entries {
  int32_t* ids;
  float* student;
  float* teacher;
};

struct Extremes {
  float student, teacher;
  unsigned poisoned;
};

// Sums of e^s, of e^u, of their differences, and of the differences' absolute values.
template <class Real>
struct Sums {
  Real student, teacher, change, size;
};

// e^((value - max) / T), 0 for a value of -inf at any T.
OPD_HD inline float exponential(float value, float max, float temperature) {
  return value == -INFINITY ? 0.0f : expf((value - max) / temperature);
}

// Returns the loss of a row. Takes ids and teacher values, -inf where an id is absent, and reads the
// student's row at the ids. Marks entries of teacher value -inf as absent, and leaves the gradients
// in `student`: 0 where an entry is absent, NaN at all others if the loss is NaN.
//
// A team shares the row. team.for_entries(k, body) calls body(i) for each entry, always on the same
// thread. team.in_steps(k, steps...) calls step(i, note) for each entry and step, where `note` is a
// float that an entry's earlier steps set; steps are loops of their own where that is faster.
// team.combine(value, operation) combines the threads' values. It sums in Team::Real.
template <class Team>
OPD_HD inline float row_divergence(Team& team, const Entries& entries, int k,
                                   const char* student_row, DType student_dtype,
                                   const Objective& objective, int64_t row) {
  using Real = typename Team::Real;
  Extremes extremes{-INFINITY, -INFINITY, 0};
  team.for_entries(k, [&](int i) {
    const float t = entries.teacher[i];
    if (t == -INFINITY) entries.ids[i] = -1;
    const int id = entries.ids[i];
    const float z = id < 0 ? -INFINITY : value_at(student_row, student_dtype, id);
    entries.student[i] = z;
    if (id < 0) return;
    extremes = {larger(extremes.student, z), larger(extremes.teacher, t),
                extremes.poisoned | poisons(z, t)};
  });
  extremes = team.combine(extremes, [](const Extremes& a, const Extremes& b) {
    return Extremes{larger(a.student, b.student), larger(a.teacher, b.teacher),
                    a.poisoned | b.poisoned};
  });
  if (extremes.poisoned || extremes.student == -INFINITY) {
    const float loss = extremes.poisoned ? NAN : 0.0f;
    team.for_entries(k, [&](int i) { entries.student[i] = entries.ids[i] < 0 ? 0.0f : loss; });
    return loss;
  }

  const float temperature = objective.temperature.at(row);
  const float teacher_temperature = objective.teacher_temperature.at(row);
  const Difference difference(extremes.student, extremes.teacher, temperature, teacher_temperature);
  Sums<Real> sums{0, 0, 0, 0};
  const auto differences = [&](int i, float& note) {
    note = difference.of(entries.student[i], entries.teacher[i]);
  };
  const auto exponentials = [&](int i, float&) {
    float& z = entries.student[i];
    float& t = entries.teacher[i];
    z = exponential(z, extremes.student, temperature);
    t = exponential(t, extremes.teacher, teacher_temperature);
    sums.student += z;
    sums.teacher += t;
  };
  const auto changes = [&](int i, float& note) {
    const float d = note;
    note = exp_change(entries.student[i], entries.teacher[i], d);
    entries.teacher[i] = d;
  };
  const auto add_changes = [&](int, float& note) {
    sums.change += note;
    sums.size += fabsf(note);
  };
  team.in_steps(k, differences, exponentials, changes, add_changes);
  sums = team.combine(sums, [](const Sums<Real>& a, const Sums<Real>& b) {
    return Sums<Real>{a.student + b.student, a.teacher + b.teacher, a.change + b.change,
                      a.size + b.size};
  });

  const auto sum = static_cast<float>(sums.student);
  const float log_sums =
      log_of_ratio(sum, static_cast<float>(sums.teacher), static_cast<float>(sums.change),
                   static_cast<float>(sums.size));
  Real total = 0;
  team.for_entries(k, [&](int i) {
    entries.student[i] /= sum;
    entries.teacher[i] -= log_sums;
    total += entry_loss(entries.student[i], entries.teacher[i]);
  });
  total = team.combine(total, [](Real a, Real b) { return a + b; });
  const auto loss = static_cast<float>(total);
  team.for_entries(k, [&](int i) {
    entries.student[i] =
        entries.ids[i] < 0 ? 0.0f
        : loss != loss ? NAN
                       : entry_gradient(entries.student[i], entries.teacher[i], loss, temperature);
  });
  return loss;
}

}  // namespace opd
