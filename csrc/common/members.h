// The members of the divergence family: what an entry with student probability p and teacher
// probability q contributes, for CPUs and GPUs. With l = log p - log q, m = log of the mixture
// beta q + (1 - beta) p, A = log p - m and B = log q - m:
//
//   part          value    slope: the derivative of the value by log p     kappa
//   reverse       p l      p (l + 1), with stop_ratio p l                  1, with stop_ratio 0
//   forward       -q l     -q                                              -1
//   skew reverse  p A      p (A + 1 - w),  w = (1 - beta) e^A              beta
//   skew forward  q B      -q w                                            -(1 - beta)
//
// A log ratio outside of [-clip, clip] is clamped, and its derivative is 0. Where p is q, the slope
// is kappa p. An entry's `rest` is its slope - kappa p, computed without this difference: late in
// training it is the whole signal, and sums of slopes minus p times their sum are sums of rests.
#pragma once

#include <cfloat>
#include <cmath>

#include "arguments.h"
#include "divergence.h"

namespace opd {

// What an entry adds to the loss, and its slope - kappa p.
struct Term {
  float value;
  float rest;
};

// A and B, and e^A - 1 and e^B - 1. Nothing overflows, on either side of p = q. With 1 for the larger
// of p and q and e^s for the other, the mixture is `whole`; the logarithms keep their digits however
// small a share is.
struct Mixture {
  float log_p, log_q;
  float change_p, change_q;

  OPD_HD Mixture(float l, float beta, float other) {
    const bool above = l >= 0;
    const float s = above ? -l : l, exponential = expf(s), change = expm1f(s);
    const float smaller = above ? beta : other, larger = above ? other : beta;  // their shares
    const float own = smaller * change;
    const bool near = own > -0.5f;
    const float whole = near ? 1 + own : larger + smaller * exponential;
    const float log_larger = near ? -log1pf(own) : -logf(whole);
    const float far = larger * (-change / exponential);  // e^-s whole - 1
    const float log_smaller = far < 1 ? -log1pf(far) : log_larger + s;
    log_p = above ? log_larger : log_smaller;
    log_q = above ? log_smaller : log_larger;
    change_p = (above ? -own : larger * change) / whole;
    change_q = (above ? larger * change : -own) / whole;
  }
};

// The divergence of one row.
struct Member {
  float reverse, forward, skew_reverse, skew_forward;
  float beta, other;  // the teacher's and the student's share of the mixture
  float clip, floor;
  bool stop_ratio;
  // Factor of the sum of q - p over the support that "generalize" adds.
  float generalize;
  float kappa;

  OPD_HD Member(const Objective& objective, int64_t row) {
    const Divergence& divergence = objective.divergence;
    const float* weights = objective.weights ? objective.weights + 4 * row : nullptr;
    reverse = weights ? weights[0] : divergence.reverse;
    forward = weights ? weights[1] : divergence.forward;
    skew_reverse = weights ? weights[2] : divergence.skew_reverse;
    skew_forward = weights ? weights[3] : divergence.skew_forward;
    if (objective.outside == Outside::kSample) forward = skew_reverse = skew_forward = 0;
    // As floats, both shares stay above 0.
    beta = divergence.beta < FLT_MIN ? FLT_MIN : divergence.beta;
    other = 1 - beta > FLT_EPSILON / 2 ? 1 - beta : FLT_EPSILON / 2;
    clip = divergence.log_ratio_clip;
    floor = divergence.logp_floor;
    stop_ratio = divergence.stop_ratio || objective.outside == Outside::kSample;
    generalize = objective.outside == Outside::kGeneralize ? reverse - forward : 0;
    kappa = (stop_ratio ? 0 : reverse) - forward + beta * skew_reverse - other * skew_forward -
            generalize;
  }

  OPD_HD bool inside(float ratio) const { return fabsf(ratio) <= clip; }

  OPD_HD float clamped(float ratio) const {
    return ratio > clip ? clip : ratio < -clip ? -clip : ratio;
  }

  // An entry of 0 adds nothing, whatever its log ratio is.
  OPD_HD Term term(float p, float q, float l) const {
    Term sum{0, 0};
    if (reverse != 0 && p > 0) {
      const float ratio = clamped(l);
      sum.value += reverse * (p * ratio);
      sum.rest += reverse * (p * (stop_ratio || inside(l) ? ratio : ratio - 1));
    }
    if (forward != 0) {
      if (q > 0) sum.value += forward * (q * clamped(-l));
      sum.rest += forward * (inside(l) ? exp_change(p, q, l) : p);
    }
    if (skew_reverse != 0 || skew_forward != 0) {
      const Mixture mixture(l, beta, other);
      if (p > 0) {
        sum.value += skew_reverse * (p * clamped(mixture.log_p));
        sum.rest += p * skew_rest(mixture);
      }
      if (q > 0) sum.value += skew_forward * (q * clamped(mixture.log_q));
    }
    if (generalize != 0) sum.value -= generalize * exp_change(p, q, l);
    sum.rest = finite(sum.rest);
    return sum;
  }

  // An entry's rest / p, which is finite or infinite where p is 0.
  OPD_HD float relative_rest(float l) const {
    float sum = 0;
    if (reverse != 0) {
      const float ratio = clamped(l);
      sum += reverse * (stop_ratio || inside(l) ? ratio : ratio - 1);
    }
    if (forward != 0) sum += forward * (inside(l) ? -expm1f(-l) : 1);
    if (skew_reverse != 0 || skew_forward != 0) sum += skew_rest(Mixture(l, beta, other));
    return sum;
  }

 private:
  // The skews' rest / p. w of the table is (1 - beta) e^A, and p e^B is q e^A.
  OPD_HD float skew_rest(const Mixture& mixture) const {
    float sum = 0;
    if (skew_reverse != 0)
      sum += skew_reverse * (inside(mixture.log_p) ? mixture.log_p - other * mixture.change_p
                                                   : clamped(mixture.log_p) - beta);
    if (skew_forward != 0)
      sum += skew_forward * other * (inside(mixture.log_q) ? -mixture.change_q : 1);
    return sum;
  }
};

}  // namespace opd
