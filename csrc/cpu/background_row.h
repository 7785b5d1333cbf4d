// The function that background.h declares. Like select_row.h it is compiled once per instruction
// set, with everything in an unnamed namespace.
//
// Writing past the cache gains nothing: the system has just cleared fresh pages through it, and in
// other memory the arithmetic is slower than the lines that are fetched first.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "background.h"
#include "exponential.h"

namespace {

using namespace opd;
using namespace opd::cpu;

// What a row's elements become. It is passed by value: memory that is written could hold it.
struct Background {
  Exponential exponential;
  Floats middle, most, scale;

  explicit Background(const Softmax& softmax)
      : exponential(softmax.temperature),
        middle(all_lanes(clean(softmax.middle))),
        most(all_lanes(88 * softmax.temperature)),  // p exceeds 1 at most at entries
        scale(all_lanes(clean(softmax.scale))) {}

  // Any NaN as the one that rounds to 16 bits without a carry.
  static float clean(float value) { return value == value ? value : NAN; }

  Floats operator()(Floats z) const {
    const auto p = exponential.of(minimum(most, z - middle));
    return p.mantissa * p.scale * scale;
  }
};

// Writes a cache line.
template <class Format>
[[gnu::always_inline]] inline void write_line(const BitsOf<Format>* from, Background background,
                                              BitsOf<Format>* to) {
  for (size_t i = 0; i < 64 / sizeof(BitsOf<Format>); i += kLanes<BitsOf<Format>>)
    apply<Format>(from + i, to + i, background);
}

// Writes elements of one line, through memory that may be read and written as a whole.
template <class Format>
inline void write_part(const BitsOf<Format>* from, int64_t count, Background background,
                       BitsOf<Format>* to) {
  BitsOf<Format> part[64 / sizeof(BitsOf<Format>)] = {};
  memcpy(part, from, count * sizeof *part);
  write_line<Format>(part, background, part);
  memcpy(to, part, count * sizeof *part);
}

template <class Format>
void background_row(const void* logits, int64_t width, const Softmax& softmax, void* out) {
  constexpr int kAheadBytes = 4096;
  constexpr int64_t kLine = 64 / sizeof(BitsOf<Format>);
  const auto* from = static_cast<const BitsOf<Format>*>(logits);
  auto* to = static_cast<BitsOf<Format>*>(out);
  const Background background(softmax);
  int64_t start = 0;
  for (; start + kLine <= width; start += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(from + start) + kAheadBytes);
    write_line<Format>(from + start, background, to + start);
  }
  write_part<Format>(from + start, width - start, background, to + start);
}

}  // namespace
