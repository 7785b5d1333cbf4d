// The exponential of vectors of floats. Like vectors.h this is compiled once per instruction set
// and must stay in an unnamed namespace.
#pragma once

#include <cfloat>

#include "elements.h"

namespace {

// a * b + c, rounded once where the instruction set can.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512BW__)
  return reinterpret_cast<Floats>(_mm512_fmadd_ps(
      reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<Floats>(_mm256_fmadd_ps(
      reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

inline Floats all_lanes(float value) { return Floats{} + value; }

// 2^y in two factors: 2^s, where s is y rounded to steps of 2^-kStepBits, and 2^(y - s). Adding
// kToSteps rounds: the sum has no room for more bits, and its low bits are s as an integer.
#if defined(__AVX2__)
constexpr int32_t kRoots[32] = {  // 2^(i / 32)
    0x3f800000, 0x3f82cd87, 0x3f85aac3, 0x3f88980f, 0x3f8b95c2, 0x3f8ea43a, 0x3f91c3d3, 0x3f94f4f0,
    0x3f9837f0, 0x3f9b8d3a, 0x3f9ef532, 0x3fa27043, 0x3fa5fed7, 0x3fa9a15b, 0x3fad583f, 0x3fb123f6,
    0x3fb504f3, 0x3fb8fbaf, 0x3fbd08a4, 0x3fc12c4d, 0x3fc5672a, 0x3fc9b9be, 0x3fce248c, 0x3fd2a81e,
    0x3fd744fd, 0x3fdbfbb8, 0x3fe0ccdf, 0x3fe5b907, 0x3feac0c7, 0x3fefe4ba, 0x3ff5257d, 0x3ffa83b3};

// The fractions of s come from a table that one or two registers hold.
class Power {
  static constexpr int kStepBits = kVectorBytes == 64 ? 5 : 3;
  static constexpr int kSteps = 1 << kStepBits;
  static constexpr int kShift = 23 - kStepBits;  // moves the integer part to a float's exponent

 public:
  static constexpr float kToSteps = 12582912.0f / kSteps;  // 1.5 * 2^23 steps

  // An entry is less by its index, which the bits of s bring along.
  Power() {
    for (int i = 0; i < kSteps; ++i)
      table_[i / kStep][i % kStep] = kRoots[i * (32 / kSteps)] - (i << kShift);
  }

  // 2^s for s >= -126. It is 0 for s = -127, and less than 2^-126 between these.
  Floats of_steps(Floats shifted) const {
    const Words steps = bits_of(shifted);
#if defined(__AVX512BW__)
    const auto root = _mm512_permutex2var_epi32(reinterpret_cast<__m512i>(table_[0]),
                                                reinterpret_cast<__m512i>(steps),
                                                reinterpret_cast<__m512i>(table_[1]));
#else
    const auto root = _mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(table_[0]),
                                                  reinterpret_cast<__m256i>(steps));
#endif
    // Unsigned, because NaN and what is not used may overflow.
    typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
    const Bits power = reinterpret_cast<Bits>(root) + (reinterpret_cast<Bits>(steps) << kShift);
    return floats_of(reinterpret_cast<Words>(power));
  }

  // 2^f for f of at most half a step, with a relative error of 5.4e-8 or less.
  static Floats of_rest(Floats f) {
    Floats rest;
    if constexpr (kStepBits == 5) {
      rest = multiply_add(f, all_lanes(0.240231819f), all_lanes(0.693157399f));
    } else {
      rest = multiply_add(f, all_lanes(5.54989005e-2f), all_lanes(0.240264073f));
      rest = multiply_add(rest, f, all_lanes(0.693147209f));
    }
    return multiply_add(rest, f, all_lanes(1.0f));
  }

 private:
  Words table_[kSteps / kStep];
};
#else
struct Power {
  // Whole steps. The 127 makes the low bits those of the power's exponent.
  static constexpr float kToSteps = 12582912.0f + 127;  // 1.5 * 2^23 + 127

  static Floats of_steps(Floats shifted) { return floats_of(bits_of(shifted) << 23); }

  // 2^f for |f| <= 1/2, with a relative error of 9e-8.
  static Floats of_rest(Floats f) {
    Floats rest = multiply_add(f, all_lanes(1.32647273e-3f), all_lanes(9.67151279e-3f));
    rest = multiply_add(rest, f, all_lanes(5.55073373e-2f));
    rest = multiply_add(rest, f, all_lanes(2.40222421e-1f));
    rest = multiply_add(rest, f, all_lanes(6.93146978e-1f));
    return multiply_add(rest, f, all_lanes(1.0f));
  }
};
#endif

// e^(x / T) with a relative error of 2e-7 and that of rounding x / T.
struct Exponential {
  Floats factor;  // log2(e) / T
  Floats least;   // where e^(x / T) is 0
  Power power;

  explicit Exponential(float temperature) {
    constexpr float kLog2E = 1.44269504f;
    // Finite, and so is `least`: beyond, -inf would not be below it.
    constexpr float kMost = FLT_MAX, kLeast = 127 / FLT_MAX * 1.001f;
    const float given = kLog2E / temperature;
    const float kept = given > kMost ? kMost : given < kLeast ? kLeast : given;
    factor = all_lanes(kept);
    least = all_lanes(-127 / kept);
  }

  // e^(x / T) as mantissa * scale, for x / T below 88. The scale is 0 where x / T is less than
  // -127 log(2). NaN stays NaN: the mantissa is.
  struct Parts {
    Floats mantissa, scale;
  };

  Parts of(Floats x) const {
    constexpr float kToSteps = Power::kToSteps;
    x = maximum(least, x);
    const Floats shifted = multiply_add(x, factor, all_lanes(kToSteps));
    const Floats f = multiply_add(x, factor, kToSteps - shifted);
    return {power.of_rest(f), power.of_steps(shifted)};
  }

  // sum + e^(x / T)
  Floats added(Floats sum, Floats x) const {
    const Parts parts = of(x);
    return multiply_add(parts.mantissa, parts.scale, sum);
  }

  // Adds e^(x / T) to the sum, with the bits of `added`, and e^(x / T) x to the moment.
  void add(Floats x, Floats* sum, Floats* moment) const {
    const Parts parts = of(x);
    *sum = multiply_add(parts.mantissa, parts.scale, *sum);
    *moment = multiply_add(parts.mantissa * parts.scale, maximum(least, x), *moment);
  }
};

}  // namespace
