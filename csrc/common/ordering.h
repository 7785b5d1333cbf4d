// The selection order, value descending then id ascending, as plain integer comparison.
//
// order_key maps a float's bits to a signed integer of the same width: sign times magnitude, so -0
// and +0 share key 0. Every NaN gets the largest key, above +infinity. No value gets the smallest
// integer, which marks "cannot be selected". The formulas use only operators that scalars and
// compiler vectors both have, so the same template serves one element and a whole register.
#pragma once

#include <cstdint>

#include "formats.h"

namespace opd {

template <class Bits>
struct KeyLimits {
  static constexpr int kShift = 8 * sizeof(Bits) - 1;
  static constexpr Bits kNotSelectable = static_cast<Bits>(Bits(1) << kShift);
  static constexpr Bits kNaN = static_cast<Bits>(~kNotSelectable);
};

template <class Format, class Value>
OPD_HD inline Value order_key(Value bits) {
  using Limits = KeyLimits<typename Format::Bits>;
  const Value sign = bits >> Limits::kShift;
  const Value magnitude = bits & Limits::kNaN;
  const Value is_nan = (Format::kInfinity - magnitude) >> Limits::kShift;
  const Value key = (magnitude ^ sign) - sign;
  return (key & ~is_nan) | (is_nan & Limits::kNaN);
}

// The value with this key; +0 for the key of the zeros.
template <class Format>
OPD_HD inline float value_of_key(int32_t key) {
  using Bits = typename Format::Bits;
  return Format::widen(static_cast<Bits>(key < 0 ? -key | KeyLimits<Bits>::kNotSelectable : key));
}

// For maxima over many values: two operations an element instead of eight. raw_key has the order of
// order_key with two exceptions. -0 comes just below +0. NaNs with the sign bit come below
// kRawNegativeInfinity, where a minimum finds them. key_of_raw turns any other raw key into its
// order key. It is monotone, so it may be applied to the maximum alone.
template <class Format, class Value>
OPD_HD inline Value raw_key(Value bits) {
  using Limits = KeyLimits<typename Format::Bits>;
  return bits ^ ((bits >> Limits::kShift) & Limits::kNaN);
}

template <class Format>
constexpr typename Format::Bits kRawNegativeInfinity =
    static_cast<typename Format::Bits>(~Format::kInfinity);

template <class Format, class Value>
OPD_HD inline Value key_of_raw(Value raw) {
  using Limits = KeyLimits<typename Format::Bits>;
  const Value key = raw - (raw >> Limits::kShift);
  const Value is_nan = (Format::kInfinity - (key & ~(key >> Limits::kShift))) >> Limits::kShift;
  return (key & ~is_nan) | (is_nan & Limits::kNaN);
}

// One unsigned integer of key and id, whose descending order is the selection order.
template <class Bits>
OPD_HD inline uint64_t rank_key(Bits key, int32_t id) {
  const uint32_t high = static_cast<uint32_t>(static_cast<int32_t>(key)) ^ 0x80000000u;
  return (static_cast<uint64_t>(high) << 32) | static_cast<uint32_t>(~id);
}

OPD_HD inline int32_t rank_key_key(uint64_t rank) {
  return static_cast<int32_t>(static_cast<uint32_t>(rank >> 32) ^ 0x80000000u);
}

OPD_HD inline int32_t rank_key_id(uint64_t rank) {
  return static_cast<int32_t>(~static_cast<uint32_t>(rank));
}

}  // namespace opd
