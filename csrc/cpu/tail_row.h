// The functions that tail.h declares. Like select_row.h it is compiled once per instruction set,
// with everything in an unnamed namespace.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "exponential.h"
#include "select_row.h"
#include "tail.h"

namespace {

using namespace opd;
using namespace opd::cpu;

// Maxima and sums of a row's groups.
template <class Format>
struct TailGroups {
  using Bits = BitsOf<Format>;
  static constexpr int kHalves = sizeof(float) / sizeof(Bits);  // elements of a word
  static constexpr int kWordElements = kTailLanes * kHalves;    // elements of kTailLanes words
  static constexpr Bits kNegativeInfinity =
      static_cast<Bits>(Format::kInfinity | KeyLimits<Bits>::kNotSelectable);

  const Bits* row;
  int64_t width;
  float temperature;
  float* maxima;
  float* sums;
  uint32_t* places;  // of the support's elements: their groups and, in the low bits, where in it
  int64_t done = 0;  // elements that are summed
  Exponential exponential{temperature};

  TailGroups(const void* row, int64_t width, float temperature, void* scratch)
      : row(static_cast<const Bits*>(row)),
        width(width),
        temperature(temperature),
        maxima(static_cast<float*>(scratch)),
        sums(maxima + groups(width)),
        places(reinterpret_cast<uint32_t*>(sums + groups(width))) {}

  static int64_t groups(int64_t width) {
    return (width + kTailBlock - 1) / kTailBlock * kTailLanes;
  }

  // Where a block has the element that is number i of group `lane`, and the inverse.
  static int element(int i, int lane) {
    return i / kHalves * kWordElements + lane * kHalves + i % kHalves;
  }
  static int lane_of(int element) { return element % kWordElements / kHalves; }
  static int number_of(int element) {
    return element / kWordElements * kHalves + element % kHalves;
  }

  // Calls body(x) with the elements of the groups from `lane` on, in order.
  template <class Body>
  static void for_elements(const Bits* block, int lane, const Body& body) {
    for (int i = 0; i < kTailElements; i += kHalves) {
      const Bits* from = block + element(i, lane);
      if constexpr (kHalves == 1) {
        body(Elements<Format>::read(from));
      } else {
        Words words;
        memcpy(&words, from, sizeof words);
        body(Pairs<Format>::low(words));
        body(Pairs<Format>::high(words));
      }
    }
  }

  // Maxima of the groups from `lane` on, or -FLT_MAX where there is no finite element or a NaN. Two
  // elements of 16 bits are compared at once, as integers.
  static Floats group_maxima(const Bits* block, int lane) {
    const Floats lowest = all_lanes(-FLT_MAX);
    if constexpr (kHalves == 1) {
      Floats most = lowest;
      for_elements(block, lane, [&](Floats x) { most = maximum(x, most); });
      return most;
    } else {
      Vector<Bits> keys = broadcast(KeyLimits<Bits>::kNotSelectable);
      for (int i = 0; i < kTailElements; i += kHalves)
        keys = lanewise_max<Bits>(keys, raw_key<Format>(load(block + element(i, lane))));
      const Words words = reinterpret_cast<Words>(raw_key<Format>(keys));  // its own inverse
      const Floats low = Pairs<Format>::low(words), high = Pairs<Format>::high(words);
      return maximum(maximum(low, high), lowest);
    }
  }

  // Sums the groups of a block. A group without a finite element or with -inf alone has the lowest
  // maximum and the sum 0. NaN and +inf make a sum NaN.
  void sum_block(const Bits* from, float* block_maxima, float* block_sums) const {
    for (int lane = 0; lane < kTailLanes; lane += kStep) {
      const Floats most = group_maxima(from, lane);
      Floats sum = {};
      for_elements(from, lane, [&](Floats x) { sum = exponential.added(sum, x - most); });
      store(block_maxima + lane, most);
      store(block_sums + lane, sum);
    }
  }

  void sum_next_block(const Bits* from) {
    const int64_t group = done / kTailBlock * kTailLanes;
    sum_block(from, maxima + group, sums + group);
    done += kTailBlock;
  }

  // Sums the blocks that end at `end` or before.
  void advance(int64_t end) {
    while (done + kTailBlock <= end) sum_next_block(row + done);
  }

  // Sums all blocks that are left, elements past the end being -inf.
  void advance_to_end() {
    constexpr int kAheadBytes = 8192, kLineBytes = 64, kIntoL2 = 2;
    while (done + kTailBlock <= width) {
      const char* ahead = reinterpret_cast<const char*>(row + done) + kAheadBytes;
      for (size_t i = 0; i < kTailBlock * sizeof(Bits); i += kLineBytes)
        __builtin_prefetch(ahead + i, 0, kIntoL2);
      sum_next_block(row + done);
    }
    if (done >= width) return;
    Bits block[kTailBlock];
    for (Bits& element : block) element = kNegativeInfinity;
    memcpy(block, row + done, (width - done) * sizeof(Bits));
    sum_next_block(block);
  }

  // Sums groups with elements of the support again, without these. kTailLanes groups at once are
  // gathered into a block.
  void leave_out(const int32_t* ids, int k) {
    int count = 0;
    for (int i = 0; i < k; ++i) {
      if (ids[i] < 0 || ids[i] >= width) continue;
      const int inside = static_cast<int>(ids[i] % kTailBlock);
      places[count++] = static_cast<uint32_t>(ids[i] - inside + lane_of(inside) * kTailElements +
                                              number_of(inside));
    }
    std::sort(places, places + count, [](uint32_t a, uint32_t b) { return a < b; });
    Bits block[kTailBlock];
    uint32_t found[kTailLanes];
    for (int i = 0; i < count;) {
      for (Bits& bits : block) bits = kNegativeInfinity;
      int lanes = 0;
      for (; i < count && lanes < kTailLanes; ++lanes) {
        const uint32_t group = found[lanes] = places[i] / kTailElements;
        const int64_t start = int64_t(group / kTailLanes) * kTailBlock;
        for (int j = 0; j < kTailElements; ++j) {
          const int64_t id = start + element(j, group % kTailLanes);
          if (id < width) block[element(j, lanes)] = row[id];
        }
        for (; i < count && places[i] / kTailElements == group; ++i)
          block[element(places[i] % kTailElements, lanes)] = kNegativeInfinity;
      }
      float block_maxima[kTailLanes], block_sums[kTailLanes];
      sum_block(block, block_maxima, block_sums);
      for (int lane = 0; lane < lanes; ++lane) {
        maxima[found[lane]] = block_maxima[lane];
        sums[found[lane]] = block_sums[lane];
      }
    }
  }

  double logsumexp() const {
    const int64_t count = groups(width);
    float lanes[kTailLanes];
    for (int lane = 0; lane < kTailLanes; lane += kStep) {
      Floats most = all_lanes(-FLT_MAX);
      for (int64_t i = lane; i < count; i += kTailLanes) {
        const Floats x = load(maxima + i);
        most = maximum(x, most);
      }
      store(lanes + lane, most);
    }
    float most = lanes[0];
    for (float lane : lanes) most = lane > most ? lane : most;
    typedef double Doubles __attribute__((vector_size(kStep * sizeof(double))));
    Doubles totals[kTailLanes / kStep] = {};
    for (int64_t i = 0; i < count; i += kTailLanes) {
      for (int lane = 0; lane < kTailLanes; lane += kStep) {
        const auto weight = exponential.of(load(maxima + i + lane) - most);
        const Floats part = load(sums + i + lane) * (weight.mantissa * weight.scale);
        totals[lane / kStep] += __builtin_convertvector(part, Doubles);
      }
    }
    double total = 0;
    for (int lane = 0; lane < kTailLanes; ++lane) total += totals[lane / kStep][lane % kStep];
    return most / static_cast<double>(temperature) + std::log(total);
  }
};

template <class Format>
double tail_sum(const void* row, int64_t width, float temperature, const int32_t* ids, int k,
                void* scratch) {
  TailGroups<Format> groups(row, width, temperature, scratch);
  groups.advance_to_end();
  groups.leave_out(ids, k);
  return groups.logsumexp();
}

template <class Format>
double select_tail(const void* row, int64_t limit, const uint64_t* banned, int k,
                   void* select_scratch, int32_t* ids, int64_t width, float temperature,
                   void* tail_scratch) {
  TailGroups<Format> groups(row, width, temperature, tail_scratch);
  select_row_with<Format>(row, limit, banned, k, select_scratch, ids,
                          [&](int64_t end) { groups.advance(end); });
  groups.advance_to_end();
  groups.leave_out(ids, k);
  return groups.logsumexp();
}

}  // namespace
