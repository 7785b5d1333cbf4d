// Any divergence of one row and its entry gradients, for CPUs and GPUs: renormalised on the
// support, or with the probability outside of it.
//
//   p = exp(z / T - lse_s),  q = exp(t / T' - lse_t)
//
// Renormalised, lse is over the support's present entries. Otherwise it is over these and a tail:
// the log-sum-exp of everything else. With the slopes of members.h and their sum c,
//
//   dL/dz_j = (slope_j - c p_j) / T  on the support,    alpha p_j / T  elsewhere
//
//   outside      adds to the loss                                  alpha
//   truncate                                                       -c
//   bucket       the tail as one more entry, with slope s          s / p_tail - c
//   generalize   (reverse - forward) sum of (q - p), slope -p      -c
//   sample       the clamped log ratio of a token outside of the   -c
//                support, whose slope is this ratio
//
// Slopes are kappa p and a rest (members.h). With R the sum of the rests, c = kappa P + R, P being
// the support's probability, or all of it for "bucket". So slope_j - c p_j = rest_j - R p_j +
// kappa (1 - P) p_j, without a difference of large terms.
//
// Log ratios come from differences in double and the ratio of the two sums, as in divergence.h.
#pragma once

#include "members.h"

namespace opd {

// What lies outside of a row's present entries: the log-sum-exps of either side.
struct RowTails {
  double student = -INFINITY;
  double teacher = -INFINITY;
};

// A sampled token that lies outside of the support; its teacher value is above -inf.
struct Token {
  bool present = false;
  float student = 0;
  float teacher = 0;
};

// A tail whose slope is so many times its p has a background relative to the tail itself: p has few
// digits there, or none.
constexpr float kFarTail = 1e25f;

struct RowResult {
  float loss = 0;
  float factor = 0;       // alpha / T
  float token_grad = 0;
  // What the factor is relative to: the student's log-sum-exp, or its tail's.
  double reference = 0;
  double sum = 1;

  OPD_HD double logsumexp() const { return reference + log(sum); }
};

// Values of one side: x / T relative to the largest of them and the tail, in double.
struct Side {
  double factor;
  double reference;
  double tail;  // relative to the reference

  OPD_HD Side(float max, double tail, float temperature) : factor(reciprocal(temperature)) {
    const double most = max == -INFINITY ? -INFINITY : max * factor;
    reference = most < tail ? tail : most;
    this->tail = tail == -INFINITY ? -INFINITY : tail - reference;
  }

  // Not above 0, although huge values round before the reference is subtracted.
  OPD_HD double of(float value) const {
    if (value == -INFINITY) return -INFINITY;
    const double relative = value * factor - reference;
    return relative > 0 ? 0 : relative;
  }
};

// log(e^a + e^b).
OPD_HD inline double log_add(double a, double b) {
  const double most = a < b ? b : a, least = a < b ? a : b;
  return least == -INFINITY ? most : most + log1p(exp(least - most));
}

// The difference of two relative values, neither NaN: that of an absent pair is 0.
OPD_HD inline float difference_of(double student, double teacher) {
  if (student == -INFINITY) return teacher == -INFINITY ? 0 : -INFINITY;
  return finite(student - teacher);
}

// Both sides of a row, their sums known.
struct Distributions {
  Side student, teacher;
  float student_sum, teacher_sum;
  float student_log, teacher_log;  // of the sums
  float log_sums;                  // log of the sums' ratio
  float floor;

  OPD_HD float p_of(double s) const { return expf(static_cast<float>(s)) / student_sum; }

  // The term of an entry and its unfloored p.
  OPD_HD Term term(const Member& member, double s, double u, float* p) const {
    *p = p_of(s);
    bool live;
    float floored_p = *p, q = expf(static_cast<float>(u)) / teacher_sum;
    const float l = log_ratio(s, u, &floored_p, &q, &live);
    Term term = member.term(floored_p, q, l);
    if (!live) term.rest = -member.kappa * *p;
    return term;
  }

  // Floors p and q, and returns the log ratio of what they are then.
  OPD_HD float log_ratio(double s, double u, float* p, float* q, bool* live) const {
    const float l = difference_of(s, u) - log_sums;
    *live = true;
    if (floor == -INFINITY) return l;
    float a = static_cast<float>(s) - student_log, b = static_cast<float>(u) - teacher_log;
    *live = a >= floor;
    if (*live && b >= floor) return l;
    if (a < floor) *p = expf(a = floor);
    if (b < floor) *q = expf(b = floor);
    return a - b;
  }
};

// Takes ids and teacher values, -inf where an id is absent, and reads the student's row at the ids.
// Marks entries of teacher value -inf as absent, and leaves the gradients in `student`. The team is
// that of row_divergence. team.once(make) is what make() returns, which one thread calls.
template <class Team>
OPD_HD inline RowResult row_full_divergence(Team& team, const Entries& entries, int k,
                                            const char* student_row, DType student_dtype,
                                            const Objective& objective, const RowTails& tails,
                                            const Token& token, int64_t row) {
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
  const bool poisoned = extremes.poisoned || !(tails.student < INFINITY) ||
                        !(tails.teacher < INFINITY) ||
                        (token.present && poisons(token.student, token.teacher));
  const bool empty = (extremes.student == -INFINITY && tails.student == -INFINITY) ||
                     (extremes.teacher == -INFINITY && tails.teacher == -INFINITY);
  if (poisoned || empty) {
    const float fill = poisoned ? NAN : 0.0f;
    team.for_entries(k, [&](int i) { entries.student[i] = entries.ids[i] < 0 ? 0.0f : fill; });
    return {fill, fill, fill, fill, 1};
  }

  struct Sides {
    Side student, teacher;
  };
  const auto& sides = team.once([&] {
    return Sides{
        {extremes.student, tails.student, objective.temperature.at(row)},
        {extremes.teacher, tails.teacher, objective.teacher_temperature.at(row)}};
  });
  Sums<Real> sums{0, 0, 0, 0};
  const auto add = [&](double s, double u) {
    const float exp_s = expf(static_cast<float>(s)), exp_u = expf(static_cast<float>(u));
    const float change = exp_change(exp_s, exp_u, difference_of(s, u));
    sums.student += exp_s;
    sums.teacher += exp_u;
    sums.change += change;
    sums.size += fabsf(change);
  };
  team.for_entries(k, [&](int i) {
    if (entries.ids[i] < 0) return;
    add(sides.student.of(entries.student[i]), sides.teacher.of(entries.teacher[i]));
  });
  sums = team.combine(sums, [](const Sums<Real>& a, const Sums<Real>& b) {
    return Sums<Real>{a.student + b.student, a.teacher + b.teacher, a.change + b.change,
                      a.size + b.size};
  });

  struct Known {
    Distributions both;
    Member member;
    Real student_sum;
  };
  const auto& known = team.once([&] {
    add(sides.student.tail, sides.teacher.tail);
    const auto student_sum = static_cast<float>(sums.student);
    const auto teacher_sum = static_cast<float>(sums.teacher);
    const Member member(objective, row);
    return Known{{sides.student,
                  sides.teacher,
                  student_sum,
                  teacher_sum,
                  logf(student_sum),
                  logf(teacher_sum),
                  log_of_ratio(student_sum, teacher_sum, static_cast<float>(sums.change),
                               static_cast<float>(sums.size)),
                  member.floor},
                 member,
                 sums.student};
  });
  struct Totals {
    Real value, rest;
  } totals{0, 0};
  team.for_entries(k, [&](int i) {
    float p = 0;
    Term term{0, 0};
    if (entries.ids[i] >= 0)
      term = known.both.term(known.member, known.both.student.of(entries.student[i]),
                             known.both.teacher.of(entries.teacher[i]), &p);
    entries.student[i] = term.rest;
    entries.teacher[i] = p;
    totals.value += term.value;
    totals.rest += term.rest;
  });
  totals = team.combine(totals, [](const Totals& a, const Totals& b) {
    return Totals{a.value + b.value, a.rest + b.rest};
  });

  // An entry's gradient. `balance` is kappa (1 - P).
  struct Gradient {
    Real rest;
    float balance, temperature;

    OPD_HD float of(float entry_rest, float p) const {
      return finite((entry_rest - rest * p + balance * p) / temperature);
    }
  };
  struct Outcome {
    Gradient gradient;
    RowResult result;
  };
  const auto& outcome = team.once([&] {
    const Distributions& both = known.both;
    const Member& member = known.member;
    // What the tail and the token add.
    float tail_rest = 0, tail_slope = 0, token_ratio = 0, token_p = 0;
    float p_tail = both.p_of(both.student.tail);
    float balance = member.kappa * p_tail;
    const Outside outside = objective.outside;
    if (outside == Outside::kBucket || outside == Outside::kRenormalize) balance = 0;
    if (outside == Outside::kBucket) {
      tail_rest = -member.kappa;
      if (tails.teacher == -INFINITY) {  // absent, with slope 0
        totals.rest += tail_rest * p_tail;
      } else {
        const Term term = both.term(member, both.student.tail, both.teacher.tail, &p_tail);
        totals.value += term.value;
        totals.rest += term.rest;
        bool live;
        float p = 0, q = 0;
        const float l = both.log_ratio(both.student.tail, both.teacher.tail, &p, &q, &live);
        if (live) tail_rest = member.relative_rest(l);
        tail_slope = term.rest;
      }
    }
    if (token.present) {
      bool live;
      float p = 0, q = 0;
      const double s = both.student.of(token.student);
      const float l = both.log_ratio(s, both.teacher.of(token.teacher), &p, &q, &live);
      token_p = both.p_of(s);
      const float ratio = finite(member.reverse * static_cast<double>(member.clamped(l)));
      totals.value += ratio;
      token_ratio = live ? ratio : 0;
      totals.rest += token_ratio;
    }

    const float temperature = objective.temperature.at(row);
    // Finite terms may overflow in float, and a p of 0 times their sum is 0.
    if constexpr (sizeof(Real) == sizeof(float)) totals.rest = finite(totals.rest);
    const Gradient gradient{totals.rest, balance, temperature};
    RowResult result;
    result.loss = static_cast<float>(totals.value);
    result.reference = both.student.reference;
    result.sum = known.student_sum;
    if (token.present) result.token_grad = gradient.of(token_ratio, token_p);
    // -c = -(kappa P + R), and 1 - P is p_tail where P is not 1.
    const Real alpha = outside == Outside::kBucket
                           ? tail_rest - totals.rest
                           : -(member.kappa - balance) - totals.rest;
    if (fabsf(tail_rest) < kFarTail) {
      result.factor = finite(alpha / temperature);
    } else if (tails.student > -INFINITY) {  // p_j / p_tail does not vanish with p_tail
      result.factor = gradient.of(tail_slope, p_tail);
      result.reference = tails.student;
      result.sum = 1;
    }
    return Outcome{gradient, result};
  });
  team.for_entries(k, [&](int i) {
    entries.student[i] = entries.ids[i] < 0
                             ? 0.0f
                             : outcome.gradient.of(entries.student[i], entries.teacher[i]);
  });
  return outcome.result;
}

}  // namespace opd
