// Vectors of floats, and elements of logits and gradients as such vectors. Like vectors.h this is
// compiled once per instruction set and must stay in an unnamed namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/formats.h"
#include "vectors.h"

namespace {

using namespace opd;

using Floats = Vector<float>;
using Words = Vector<int32_t>;
constexpr int kStep = kLanes<float>;

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

inline Words bits_of(Floats values) { return reinterpret_cast<Words>(values); }
inline Floats floats_of(Words bits) { return reinterpret_cast<Floats>(bits); }

// a > b ? a : b and a < b ? a : b, so b where either is NaN. Compilers do not make one instruction
// of that.
#if defined(__AVX512BW__)
// The forms without a mask read what GCC 12 calls uninitialised.
inline Floats maximum(Floats a, Floats b) {
  const auto x = reinterpret_cast<__m512>(a), y = reinterpret_cast<__m512>(b);
  return reinterpret_cast<Floats>(_mm512_mask_max_ps(x, 0xffff, x, y));
}
inline Floats minimum(Floats a, Floats b) {
  const auto x = reinterpret_cast<__m512>(a), y = reinterpret_cast<__m512>(b);
  return reinterpret_cast<Floats>(_mm512_mask_min_ps(x, 0xffff, x, y));
}
#elif defined(__AVX2__)
inline Floats maximum(Floats a, Floats b) {
  const auto x = reinterpret_cast<__m256>(a), y = reinterpret_cast<__m256>(b);
  return reinterpret_cast<Floats>(_mm256_max_ps(x, y));
}
inline Floats minimum(Floats a, Floats b) {
  const auto x = reinterpret_cast<__m256>(a), y = reinterpret_cast<__m256>(b);
  return reinterpret_cast<Floats>(_mm256_min_ps(x, y));
}
#elif defined(__SSE2__)
inline Floats maximum(Floats a, Floats b) {
  const auto x = reinterpret_cast<__m128>(a), y = reinterpret_cast<__m128>(b);
  return reinterpret_cast<Floats>(_mm_max_ps(x, y));
}
inline Floats minimum(Floats a, Floats b) {
  const auto x = reinterpret_cast<__m128>(a), y = reinterpret_cast<__m128>(b);
  return reinterpret_cast<Floats>(_mm_min_ps(x, y));
}
#else
inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }
inline Floats minimum(Floats a, Floats b) { return a < b ? a : b; }
#endif

inline Words load_halves(const int16_t* from) {
  Halves halves;
  memcpy(&halves, from, sizeof halves);
  return __builtin_convertvector(halves, Words);
}

inline void store_halves(int16_t* to, Words words) {
  const Halves halves = __builtin_convertvector(words, Halves);
  memcpy(to, &halves, sizeof halves);
}

// Converts a vector of elements to and from floats, as formats.h does. Its functions must not be
// called here, because other files share them.
template <class Format>
struct Elements;

template <>
struct Elements<Float32> {
  static Floats read(const int32_t* from) { return floats_of(load(from)); }
  static void write(int32_t* to, Floats values) { store(to, bits_of(values)); }
};

// Two elements of 16 bits lie in a word of 32. Taking words apart needs no shuffles across lanes.
template <class Format>
struct Pairs;

template <>
struct Pairs<BFloat16> {
  static Floats low(Words words) { return floats_of(words << 16); }
  static Floats high(Words words) { return floats_of(words & static_cast<int>(0xffff0000)); }

  // Elements in the high halves of words, and anything in the low halves.
  static Words rounded(Floats values) {
    const Words bits = bits_of(values);
    return values == values ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
  }

  // Both at once. The low half of a NaN must be 0, as in NaNs that a bfloat16 was widened to.
  static Words rounded(Floats low, Floats high) {
    using Parts = Vector<uint16_t>;
    const auto a = reinterpret_cast<Vector<uint32_t>>(low);
    const auto b = reinterpret_cast<Vector<uint32_t>>(high);
    const auto kept = reinterpret_cast<Parts>((a >> 16) | (b & 0xffff0000));
    const auto rest = reinterpret_cast<Parts>((a & 0x0000ffff) | (b << 16));
    const auto up = (rest | (kept & 1)) > 0x8000;  // -1: more than half, or half of an odd one
    return reinterpret_cast<Words>(kept - reinterpret_cast<Parts>(up));
  }
};

template <>
struct Pairs<Float16> {
  static Floats widened(Words half) {
    const Words sign = (half & 0x8000) << 16, magnitude = (half & 0x7fff) << 13;
    const Words scaled = bits_of(floats_of(magnitude) * floats_of(broadcast(0x77800000)));
    return floats_of(sign | (magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : scaled));
  }
  static Floats low(Words words) { return widened(words); }
  static Floats high(Words words) { return widened(words >> 16); }

  static Words rounded(Floats values) {
    const Words bits = bits_of(values), magnitude = bits & 0x7fffffff;
    const Words small = bits_of(floats_of(magnitude) + 0.5f) - 0x3f000000;
    const Words normal = (magnitude - 0x38000000 + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
    Words half = magnitude < 0x38800000 ? small : normal;
    half = magnitude >= 0x477ff000 ? broadcast(0x7c00) : half;
    half = magnitude > 0x7f800000 ? broadcast(0x7e00) : half;
    return (bits & static_cast<int>(0x80000000)) | (half << 16);
  }

  static Words rounded(Floats low, Floats high) {
    const Words first = (rounded(low) >> 16) & 0xffff;
    return first | (rounded(high) & static_cast<int>(0xffff0000));
  }
};

template <class Format>
struct ElementsOf16Bits {
  static Floats read(const int16_t* from) { return Pairs<Format>::low(load_halves(from)); }
  static void write(int16_t* to, Floats values) {
    store_halves(to, Pairs<Format>::rounded(values) >> 16);
  }
};

template <>
struct Elements<BFloat16> : ElementsOf16Bits<BFloat16> {};
template <>
struct Elements<Float16> : ElementsOf16Bits<Float16> {};

template <class Format>
using BitsOf = typename Format::Bits;

// to = function(from) for the elements of a vector. If it were not inlined, a loop would load what
// the function holds in each of its steps.
template <class Format, class Function>
[[gnu::always_inline]] inline void apply(const BitsOf<Format>* from, BitsOf<Format>* to,
                                         const Function& function) {
  if constexpr (sizeof(BitsOf<Format>) == sizeof(float)) {
    Elements<Format>::write(to, function(Elements<Format>::read(from)));
  } else {
    Words words;
    memcpy(&words, from, sizeof words);
    words = Pairs<Format>::rounded(function(Pairs<Format>::low(words)),
                                   function(Pairs<Format>::high(words)));
    memcpy(to, &words, sizeof words);
  }
}

}  // namespace
