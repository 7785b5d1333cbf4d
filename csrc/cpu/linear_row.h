// The functions that linear.h declares. Like select_row.h it is compiled once per instruction set,
// with everything in an unnamed namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "elements.h"
#include "linear.h"

namespace {

using namespace opd;
using namespace opd::cpu;

constexpr int kParts = kBlock / kStep;  // vectors of a block

// A copy of the elements after a row's whole blocks, padded to a block.
template <class Format>
struct Tail {
  BitsOf<Format> elements[kBlock] = {};

  Tail() = default;
  Tail(const BitsOf<Format>* row, int64_t width) {
    const int64_t whole = width / kBlock * kBlock;
    memcpy(elements, row + whole, (width - whole) * sizeof(BitsOf<Format>));
  }
};

template <class Format>
void widen(const void* row, int64_t width, float* to) {
  const auto* from = static_cast<const BitsOf<Format>*>(row);
  int64_t i = 0;
  for (; i + kBlock <= width; i += kBlock)
    for (int part = 0; part < kBlock; part += kStep)
      store(to + i + part, Elements<Format>::read(from + i + part));
  if (i == width) return;
  const Tail<Format> tail(from, width);
  for (int part = 0; part < kBlock; part += kStep)
    store(to + i + part, Elements<Format>::read(tail.elements + part));
}

template <class Format, int Count>
inline void add_products(const float* vector, const BitsOf<Format>* const* rows, int64_t offset,
                         Floats (*sums)[kParts]) {
  for (int part = 0; part < kParts; ++part) {
    const Floats values = load(vector + part * kStep);
    for (int r = 0; r < Count; ++r)
      sums[r][part] += values * Elements<Format>::read(rows[r] + offset + part * kStep);
  }
}

inline float sum_of_lanes(const Floats (&parts)[kParts]) {
  float lanes[kBlock];
  for (int part = 0; part < kParts; ++part) store(lanes + part * kStep, parts[part]);
  for (int half = kBlock / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// Dot products of Count rows at once: their sums do not wait for each other. Prefetches `next`, the
// rows that follow.
template <class Format, int Count>
inline void dot_rows(const float* vector, const void* const* rows, const void* const* next,
                     int64_t width, float* out) {
  using Bits = BitsOf<Format>;
  const Bits *from[Count], *ahead[Count];
  for (int r = 0; r < Count; ++r) {
    from[r] = static_cast<const Bits*>(rows[r]);
    ahead[r] = static_cast<const Bits*>(next[r]);
  }
  Floats sums[Count][kParts] = {};
  int64_t i = 0;
  for (; i + kBlock <= width; i += kBlock) {
    for (int r = 0; r < Count; ++r) __builtin_prefetch(ahead[r] + i);
    add_products<Format, Count>(vector + i, from, i, sums);
  }
  if (i < width) {
    Tail<Format> tails[Count];
    for (int r = 0; r < Count; ++r) {
      tails[r] = Tail<Format>(from[r], width);
      from[r] = tails[r].elements;
    }
    add_products<Format, Count>(vector + i, from, 0, sums);
  }
  for (int r = 0; r < Count; ++r) out[r] = sum_of_lanes(sums[r]);
}

constexpr int kRowsAtOnce = 4;

template <class Format>
void dots(const float* vector, const void* const* rows, int count, int64_t width, float* out) {
  int r = 0;
  for (; r + kRowsAtOnce <= count; r += kRowsAtOnce) {
    const void* const* next = r + 2 * kRowsAtOnce <= count ? rows + r + kRowsAtOnce : rows + r;
    dot_rows<Format, kRowsAtOnce>(vector, rows + r, next, width, out + r);
  }
  for (; r < count; ++r) dot_rows<Format, 1>(vector, rows + r, rows + r, width, out + r);
}

template <class Format, int Count>
inline void add_few_rows(const float* factors, const void* const* rows, const void* const* next,
                         int64_t width, float* sum) {
  using Bits = BitsOf<Format>;
  const Bits *from[Count], *ahead[Count];
  for (int r = 0; r < Count; ++r) {
    from[r] = static_cast<const Bits*>(rows[r]);
    ahead[r] = static_cast<const Bits*>(next[r]);
  }
  const auto add = [&](int64_t offset, float* to) {
    for (int part = 0; part < kBlock; part += kStep) {
      Floats total = load(to + part);
      for (int r = 0; r < Count; ++r)
        total += factors[r] * Elements<Format>::read(from[r] + offset + part);
      store(to + part, total);
    }
  };
  int64_t i = 0;
  for (; i + kBlock <= width; i += kBlock) {
    for (int r = 0; r < Count; ++r) __builtin_prefetch(ahead[r] + i);
    add(i, sum + i);
  }
  if (i == width) return;
  Tail<Format> tails[Count];
  for (int r = 0; r < Count; ++r) {
    tails[r] = Tail<Format>(from[r], width);
    from[r] = tails[r].elements;
  }
  add(0, sum + i);
}

template <class Format>
void add_rows(const float* factors, const void* const* rows, int64_t count, int64_t width,
              float* sum) {
  int64_t r = 0;
  for (; r + kRowsAtOnce <= count; r += kRowsAtOnce) {
    const void* const* next = r + 2 * kRowsAtOnce <= count ? rows + r + kRowsAtOnce : rows + r;
    add_few_rows<Format, kRowsAtOnce>(factors + r, rows + r, next, width, sum);
  }
  for (; r < count; ++r) add_few_rows<Format, 1>(factors + r, rows + r, rows + r, width, sum);
}

template <class Format>
void round_row(const float* from, int64_t width, void* row) {
  auto* to = static_cast<BitsOf<Format>*>(row);
  int64_t i = 0;
  for (; i + kBlock <= width; i += kBlock)
    for (int part = 0; part < kBlock; part += kStep)
      Elements<Format>::write(to + i + part, load(from + i + part));
  if (i == width) return;
  Tail<Format> tail;
  for (int part = 0; part < kBlock; part += kStep)
    Elements<Format>::write(tail.elements + part, load(from + i + part));
  memcpy(to + i, tail.elements, (width - i) * sizeof(BitsOf<Format>));
}

}  // namespace
