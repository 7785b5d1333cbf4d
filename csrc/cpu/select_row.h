// The body of select_row, in compiler vectors as wide as the including file's flags allow.
//
// NOTES: everything is in an unnamed namespace, and no standard template is instantiated on a type
// that others could share. Otherwise the linker might pick one instruction set's copy for all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../common/ordering.h"
#include "select.h"

namespace {

using namespace opd;
using namespace opd::cpu;

#if defined(__AVX512BW__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2, NEON
#endif

template <class Bits>
struct VectorOf {
  typedef Bits type __attribute__((vector_size(kVectorBytes)));
};
template <class Bits>
using Vector = typename VectorOf<Bits>::type;

template <class Bits>
constexpr int kLanes = kVectorBytes / sizeof(Bits);

template <class Bits>
inline Vector<Bits> load(const Bits* from) {
  Vector<Bits> v;
  memcpy(&v, from, kVectorBytes);
  return v;
}

template <class Bits>
inline Vector<Bits> lanewise_max(Vector<Bits> a, Vector<Bits> b) {
  return a > b ? a : b;
}

// Lanes l and l ^ Distance exchanged.
template <int Distance, class V, size_t... Lane>
inline V exchange(V v, std::index_sequence<Lane...>) {
  return __builtin_shufflevector(v, v, (static_cast<int>(Lane) ^ Distance)...);
}

// Every lane gets the maximum of its aligned run of Width lanes.
template <int Width, class Bits>
inline Vector<Bits> run_max(Vector<Bits> v) {
  if constexpr (Width > 1) {
    v = run_max<Width / 2, Bits>(v);
    v = lanewise_max<Bits>(v, exchange<Width / 2>(v, std::make_index_sequence<kLanes<Bits>>()));
  }
  return v;
}

// All ones in the lanes whose bit is set; bits holds one bit per lane.
template <class Bits>
inline Vector<Bits> expand_bits(uint64_t bits) {
  Vector<Bits> spread, lane_bit;
  for (int lane = 0; lane < kLanes<Bits>; ++lane) {
    spread[lane] = static_cast<Bits>(bits >> (lane & ~15));
    lane_bit[lane] = static_cast<Bits>(1u << (lane & 15));
  }
  return (spread & lane_bit) != Vector<Bits>{};
}

template <class Format>
struct RowSelector {
  using Bits = typename Format::Bits;
  using V = Vector<Bits>;
  static constexpr int kWidth = kLanes<Bits>;
  static constexpr Bits kNotSelectable = KeyLimits<Bits>::kNotSelectable;

  const Bits* row;
  int64_t limit;
  const uint64_t* banned;

  // Bits of the ban map for ids [start, start + 64); start is a multiple of a divisor of 64.
  uint64_t banned_bits(int64_t start) const { return banned[start >> 6] >> (start & 63); }

  // Keys of one vector that lies inside the row.
  V keys_at(int64_t start) const {
    V keys = order_key<Format>(load(row + start));
    if (banned) {
      const uint64_t bits = banned_bits(start);
      if (bits) {
        const V ban = expand_bits<Bits>(bits);
        keys = (keys & ~ban) | (ban & kNotSelectable);
      }
    }
    return keys;
  }

  // Keys of a vector that the row's end cuts; nothing at or past `limit` is read.
  V keys_at_end(int64_t start) const {
    Bits keys[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) {
      const int64_t id = start + lane;
      const bool selectable = id < limit && !(banned && ((banned[id >> 6] >> (id & 63)) & 1));
      keys[lane] = selectable ? static_cast<Bits>(order_key<Format, int>(row[id])) : kNotSelectable;
    }
    return load(keys);
  }

  V keys(int64_t start) const {
    return start + kWidth <= limit ? keys_at(start) : keys_at_end(start);
  }

  // Maxima of all groups; returns how many there are. `maxima` has room for whole vectors, and what
  // is past the last group is set to kNotSelectable.
  template <int Group>
  int64_t group_maxima(Bits* maxima) const {
    constexpr int kRun = Group < kWidth ? Group : kWidth;  // lanes of a vector that one group owns
    constexpr int kVectors = Group / kRun;                 // vectors of one group
    const int64_t step = int64_t(kVectors) * kWidth;
    int64_t groups = 0;
    for (int64_t start = 0; start < limit; start += step) {
      V best;
      if (start + step <= limit) {
        best = keys_at(start);
        for (int i = 1; i < kVectors; ++i)
          best = lanewise_max<Bits>(best, keys_at(start + i * kWidth));
      } else {
        best = keys(start);
        for (int i = 1; i < kVectors; ++i)
          best = lanewise_max<Bits>(best, keys(start + i * kWidth));
      }
      best = run_max<kRun, Bits>(best);
      for (int lane = 0; lane < kWidth; lane += kRun) maxima[groups++] = best[lane];
    }
    for (int64_t i = groups; i % kWidth; ++i) maxima[i] = kNotSelectable;
    return groups;
  }
};

// How many of the `vectors` whole vectors' keys are at least `threshold`.
template <class Bits>
inline int64_t count_at_least(const Bits* keys, int64_t vectors, Bits threshold) {
  Vector<Bits> counts = {};
  int64_t total = 0;
  constexpr int64_t kFlush = 16384;  // a 16-bit lane counts at most one a vector
  for (int64_t first = 0; first < vectors; first += kFlush) {
    const int64_t last = first + kFlush < vectors ? first + kFlush : vectors;
    for (int64_t i = first; i < last; ++i)
      counts -= (load(keys + i * kLanes<Bits>) >= threshold);
    for (int lane = 0; lane < kLanes<Bits>; ++lane) total += counts[lane];
    counts = Vector<Bits>{};
  }
  return total;
}

// The k-th largest key, or kNotSelectable if fewer than k can be selected.
template <class Bits>
inline Bits kth_largest(const Bits* keys, int64_t vectors, int k) {
  using Unsigned = typename std::make_unsigned<Bits>::type;
  constexpr Unsigned kTop = Unsigned(Unsigned(1) << KeyLimits<Bits>::kShift);
  Unsigned threshold = 0;
  for (Unsigned bit = kTop; bit; bit = Unsigned(bit >> 1)) {
    const Unsigned candidate = Unsigned(threshold | bit);
    if (count_at_least<Bits>(keys, vectors, static_cast<Bits>(candidate ^ kTop)) >= k)
      threshold = candidate;
  }
  return static_cast<Bits>(threshold ^ kTop);
}

// Positions of the k largest keys, ascending; equal keys at the threshold enter from the left.
// Returns how many were found: fewer than k where not as many can be selected.
template <class Bits>
inline int largest_positions(const Bits* keys, int64_t count, int k, int32_t* positions) {
  const int64_t vectors = (count + kLanes<Bits> - 1) / kLanes<Bits>;
  const Bits threshold = kth_largest<Bits>(keys, vectors, k);
  int found = 0;
  if (threshold == KeyLimits<Bits>::kNotSelectable) {
    for (int64_t i = 0; i < count; ++i)
      if (keys[i] != KeyLimits<Bits>::kNotSelectable) positions[found++] = static_cast<int32_t>(i);
    return found;
  }
  const int64_t above = threshold == KeyLimits<Bits>::kNaN
                            ? 0
                            : count_at_least<Bits>(keys, vectors, static_cast<Bits>(threshold + 1));
  int64_t ties = k - above;
  for (int64_t i = 0; found < k; ++i) {
    const bool tie = keys[i] == threshold;
    positions[found] = static_cast<int32_t>(i);
    found += (keys[i] > threshold) | (tie & (ties > 0));
    ties -= tie;
  }
  return found;
}

template <class Format, int Group>
inline void select_row_grouped(const RowSelector<Format>& selector, int k, void* scratch,
                               int32_t* ids) {
  using Bits = typename Format::Bits;
  constexpr int kWidth = kLanes<Bits>;
  // Layout of the scratch: ranks[k], chosen[k], both rounded up, then the keys of either pass.
  char* at = static_cast<char*>(scratch);
  uint64_t* ranks = reinterpret_cast<uint64_t*>(at);
  at += (k * sizeof(uint64_t) + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
  int32_t* chosen = reinterpret_cast<int32_t*>(at);
  at += (k * sizeof(int32_t) + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
  Bits* keys = reinterpret_cast<Bits*>(at);

  const int64_t groups = selector.template group_maxima<Group>(keys);
  const int chosen_groups = largest_positions<Bits>(keys, groups, k, chosen);

  // The maxima are spent: the candidates' keys take their place, in ascending order of id.
  constexpr int kStep = Group > kWidth ? Group : kWidth;
  int64_t candidates = 0;
  for (int g = 0; g < chosen_groups; ++g) {
    const int64_t start = int64_t(chosen[g]) * Group;
    if constexpr (Group >= kWidth) {
      for (int i = 0; i < Group; i += kWidth) {
        const Vector<Bits> v = selector.keys(start + i);
        memcpy(keys + candidates + i, &v, kVectorBytes);
      }
    } else {
      const Vector<Bits> v = selector.keys(start & ~int64_t(kStep - 1));
      const Bits* group = reinterpret_cast<const Bits*>(&v) + (start & (kStep - 1));
      memcpy(keys + candidates, group, Group * sizeof(Bits));
    }
    candidates += Group;
  }
  for (int64_t i = candidates; i % kWidth; ++i) keys[i] = KeyLimits<Bits>::kNotSelectable;

  const int found = largest_positions<Bits>(keys, candidates, k, ids);
  for (int i = 0; i < found; ++i) {
    const int32_t position = ids[i];
    const int32_t id = chosen[position / Group] * Group + position % Group;
    ranks[i] = rank_key<Bits>(keys[position], id);
  }
  std::sort(ranks, ranks + found, [](uint64_t a, uint64_t b) { return a > b; });
  for (int i = 0; i < k; ++i) ids[i] = i < found ? rank_key_id(ranks[i]) : -1;
}

template <class Format>
void select_row(const void* row, int64_t limit, const uint64_t* banned, int k, void* scratch,
                int32_t* ids) {
  const RowSelector<Format> selector{static_cast<const typename Format::Bits*>(row), limit, banned};
  if (group_size(k) == kWideGroup)
    select_row_grouped<Format, kWideGroup>(selector, k, scratch, ids);
  else
    select_row_grouped<Format, kNarrowGroup>(selector, k, scratch, ids);
}

}  // namespace
