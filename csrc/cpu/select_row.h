// The body of select_row. Each including file compiles it for one instruction set.
//
// NOTES: everything is in an unnamed namespace, and no standard template is instantiated on a type
// that other files could share. Otherwise the linker might keep one instruction set's copy for all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../common/ordering.h"
#include "select.h"
#include "vectors.h"

namespace {

using namespace opd;
using namespace opd::cpu;

template <class Format>
struct RowReader {
  using Bits = typename Format::Bits;
  using V = Vector<Bits>;
  static constexpr int kWidth = kLanes<Bits>;
  static constexpr Bits kNotSelectable = KeyLimits<Bits>::kNotSelectable;

  const Bits* row;
  int64_t limit;
  const uint64_t* banned;

  // Order keys of the vector at `start`; kNotSelectable for banned ids and from `limit` on, where
  // nothing is read.
  V keys(int64_t start) const {
    if (start + kWidth > limit) return keys_at_end(start);
    V keys = order_key<Format>(load(row + start));
    // A vector's bits lie in one word, because its width divides 64 and so does its start.
    if (const uint64_t bits = banned ? banned[start >> 6] >> (start & 63) : 0) {
      const V ban = lanes_of<Bits>(bits);
      keys = (keys & ~ban) | (ban & kNotSelectable);
    }
    return keys;
  }

  V keys_at_end(int64_t start) const {
    Bits keys[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) {
      const int64_t id = start + lane;
      const bool selectable = id < limit && !(banned && ((banned[id >> 6] >> (id & 63)) & 1));
      keys[lane] = selectable ? static_cast<Bits>(order_key<Format, int>(row[id])) : kNotSelectable;
    }
    return load(keys);
  }

  bool any_banned(int64_t start, int64_t end) const {
    uint64_t any = 0;
    if (banned)
      for (int64_t word = start >> 6; word < end >> 6; ++word) any |= banned[word];
    return any != 0;
  }
};

// Pass 1. A block has kRun leaves. A leaf is reduced to one vector, which covers one group or
// several whole ones.
template <class Format, int Group>
struct GroupMaxima {
  using Bits = typename Format::Bits;
  using V = Vector<Bits>;
  static constexpr int kWidth = kLanes<Bits>;
  static constexpr int kRun = Group < kWidth ? Group : kWidth;     // lanes that one group owns
  static constexpr int kLeaf = Group > kWidth ? Group : kWidth;    // elements of a leaf
  static constexpr int64_t kBlock = int64_t(kRun) * kLeaf;         // elements of a block
  static constexpr auto kLaneIndices = std::make_index_sequence<kWidth>();

  const RowReader<Format>& reader;
  V lowest_raw = V{};  // of all raw keys: one below -inf is a NaN with the sign bit

  // Hardware prefetching stops at page ends, so lines are prefetched well ahead. Past the row's end
  // they are usually the next row's. A prefetch never faults and is not a read.
  V raw_keys(int64_t start) {
    constexpr int kAheadBytes = 8192, kIntoL2 = 2;
    const Bits* from = reader.row + start;
    __builtin_prefetch(reinterpret_cast<const char*>(from) + kAheadBytes, 0, kIntoL2);
    const V keys = raw_key<Format>(load(from));
    lowest_raw = lanewise_min<Bits>(lowest_raw, keys);
    return keys;
  }

  // A leaf inside the row.
  V raw_leaf(int64_t start) {
    V best = raw_keys(start);
    for (int i = kWidth; i < kLeaf; i += kWidth)
      best = lanewise_max<Bits>(best, raw_keys(start + i));
    return best;
  }

  V exact_leaf(int64_t start) {
    V best = reader.keys(start);
    for (int i = kWidth; i < kLeaf; i += kWidth)
      best = lanewise_max<Bits>(best, reader.keys(start + i));
    return best;
  }

  // Lane l is the maximum of run l / kRun of leaf l % kRun. The tree is walked depth first, so that
  // few partial results are live.
  template <bool Raw, int Leaves>
  V reduce(int64_t start) {
    if constexpr (Leaves == 1) {
      return Raw ? raw_leaf(start) : exact_leaf(start);
    } else {
      const V low = reduce<Raw, Leaves / 2>(start);
      const V high = reduce<Raw, Leaves / 2>(start + int64_t(Leaves / 2) * kLeaf);
      return fold<Leaves / 2, Bits>(low, high, kLaneIndices);
    }
  }

  // Writes the maxima of all groups. Returns how many it wrote, a whole number of vectors: groups
  // past the row's end are kNotSelectable. After each block, while it is in L1, calls after(end)
  // with its end or the row's. The blocks may be passed twice.
  template <class After>
  int64_t write(Bits* maxima, const After& after) {
    bool exact_only = false;
    for (;;) {
      int64_t groups = 0;
      for (int64_t start = 0; start < reader.limit; start += kBlock, groups += kWidth) {
        const bool raw = !exact_only && start + kBlock <= reader.limit &&
                         !reader.any_banned(start, start + kBlock);
        const V best = raw ? key_of_raw<Format>(reduce<true, kRun>(start))
                           : reduce<false, kRun>(start);
        store(maxima + groups, interleave_runs<kRun, Bits>(best, kLaneIndices));
        after(start + kBlock < reader.limit ? start + kBlock : reader.limit);
      }
      if (exact_only || !lane_bits(lowest_raw < kRawNegativeInfinity<Format>)) return groups;
      exact_only = true;
    }
  }
};

template <class Bits>
inline int64_t count_at_least(const Bits* keys, int64_t vectors, Bits threshold) {
  int64_t count = 0;
  for (int64_t i = 0; i < vectors; ++i)
    count += __builtin_popcountll(lane_bits(load(keys + i * kLanes<Bits>) >= threshold));
  return count;
}

// The k largest keys: all above the threshold, and `ties` of those equal to it.
template <class Bits>
struct Cut {
  Bits threshold;
  int64_t ties;
};

// Bisects the keys' range. Needs k or more keys in [low, high] and none above.
template <class Bits>
inline Cut<Bits> cut_for(const Bits* keys, int64_t vectors, int k, Bits low, Bits high) {
  int64_t above = 0;  // keys larger than `high`
  while (low < high) {
    const Bits middle = static_cast<Bits>(low + (int64_t(high) - low + 1) / 2);
    const int64_t count = count_at_least<Bits>(keys, vectors, middle);
    if (count == k) return {middle, k};
    if (count > k) {
      low = middle;
    } else {
      high = static_cast<Bits>(middle - 1);
      above = count;
    }
  }
  return {low, k - above};
}

// Writes the positions of the keys that the cut takes, ascending; ties go to the lower position.
// Keys that cannot be selected are never taken. Returns how many were found, at most k.
template <class Bits>
inline int take(const Bits* keys, int64_t vectors, int k, Cut<Bits> cut, int32_t* positions) {
  int found = 0;
  for (int64_t i = 0; i < vectors && found < k; ++i) {
    const Vector<Bits> v = load(keys + i * kLanes<Bits>);
    uint64_t hits = lane_bits((v >= cut.threshold) & (v != KeyLimits<Bits>::kNotSelectable));
    for (; hits && found < k; hits &= hits - 1) {
      const int64_t position = i * kLanes<Bits> + __builtin_ctzll(hits);
      if (keys[position] == cut.threshold && cut.ties-- <= 0) continue;
      positions[found++] = static_cast<int32_t>(position);
    }
  }
  return found;
}

template <class Bits>
inline void range_of(const Bits* keys, int64_t vectors, Bits* low, Bits* high) {
  Vector<Bits> least = load(keys), most = least;
  for (int64_t i = 1; i < vectors; ++i) {
    const Vector<Bits> v = load(keys + i * kLanes<Bits>);
    least = lanewise_min<Bits>(least, v);
    most = lanewise_max<Bits>(most, v);
  }
  *low = least[0];
  *high = most[0];
  for (int lane = 1; lane < kLanes<Bits>; ++lane) {
    *low = least[lane] < *low ? least[lane] : *low;
    *high = most[lane] > *high ? most[lane] : *high;
  }
}

// Copies the keys of one group.
template <class Format, int Group>
inline void read_group(const RowReader<Format>& reader, int64_t group,
                       typename Format::Bits* keys) {
  using Bits = typename Format::Bits;
  constexpr int kWidth = kLanes<Bits>;
  const int64_t start = group * Group;
  if constexpr (Group >= kWidth) {
    for (int i = 0; i < Group; i += kWidth) store(keys + i, reader.keys(start + i));
  } else {
    Bits vector[kWidth];
    store(vector, reader.keys(start / kWidth * kWidth));
    memcpy(keys, vector + start % kWidth, Group * sizeof(Bits));
  }
}

template <class Format, int Group, class After>
inline void select_row_grouped(const RowReader<Format>& reader, int k, void* scratch, int32_t* ids,
                               const After& after) {
  using Bits = typename Format::Bits;
  constexpr int kWidth = kLanes<Bits>;
  // The scratch holds ranks[k], chosen[k] and the keys of either pass, each on its own cache lines.
  char* part = static_cast<char*>(scratch);
  auto* ranks = reinterpret_cast<uint64_t*>(part);
  part += round_up(k * sizeof(uint64_t), kScratchAlignment);
  auto* chosen = reinterpret_cast<int32_t*>(part);
  part += round_up(k * sizeof(int32_t), kScratchAlignment);
  auto* keys = reinterpret_cast<Bits*>(part);

  const int64_t groups = GroupMaxima<Format, Group>{reader}.write(keys, after);
  Bits low, high;
  range_of<Bits>(keys, groups / kWidth, &low, &high);
  Cut<Bits> cut = {low, k};
  if (groups > k) cut = cut_for<Bits>(keys, groups / kWidth, k, low, high);
  const int taken = take<Bits>(keys, groups / kWidth, k, cut, chosen);

  // The maxima are no longer needed: the candidates' keys take their place, in ascending order of
  // id. k groups reach the first cut's threshold, so at least k candidates do.
  for (int g = 0; g < taken; ++g) read_group<Format, Group>(reader, chosen[g], keys + g * Group);
  int64_t candidates = int64_t(taken) * Group;
  while (candidates % kWidth) keys[candidates++] = KeyLimits<Bits>::kNotSelectable;
  if (taken < k) low = KeyLimits<Bits>::kNotSelectable;
  else low = cut.threshold;
  cut = {low, k};
  if (candidates > k) cut = cut_for<Bits>(keys, candidates / kWidth, k, low, high);
  const int found = take<Bits>(keys, candidates / kWidth, k, cut, ids);

  for (int i = 0; i < found; ++i) {
    const int32_t position = ids[i];
    const int32_t id = chosen[position / Group] * Group + position % Group;
    ranks[i] = rank_key<Bits>(keys[position], id);
  }
  std::sort(ranks, ranks + found, [](uint64_t a, uint64_t b) { return a > b; });
  for (int i = 0; i < k; ++i) ids[i] = i < found ? rank_key_id(ranks[i]) : -1;
}

template <class Format, class After>
inline void select_row_with(const void* row, int64_t limit, const uint64_t* banned, int k,
                            void* scratch, int32_t* ids, const After& after) {
  const RowReader<Format> reader{static_cast<const typename Format::Bits*>(row), limit, banned};
  if (group_size(k) == kWideGroup)
    select_row_grouped<Format, kWideGroup>(reader, k, scratch, ids, after);
  else
    select_row_grouped<Format, kNarrowGroup>(reader, k, scratch, ids, after);
}

template <class Format>
void select_row(const void* row, int64_t limit, const uint64_t* banned, int k, void* scratch,
                int32_t* ids) {
  select_row_with<Format>(row, limit, banned, k, scratch, ids, [](int64_t) {});
}

}  // namespace
