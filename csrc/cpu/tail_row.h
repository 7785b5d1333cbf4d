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
template <class Format, bool kEntropy>
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
  float* moments;    // sums of exp((x - m) / T) (x - m), if the entropy is wanted
  uint32_t* places;  // of the support's elements: their groups and, in the low bits, where in it
  int64_t done = 0;  // elements that are summed
  Exponential exponential{temperature};

  TailGroups(const void* row, const TailOf& tail, void* scratch)
      : row(static_cast<const Bits*>(row)),
        width(tail.width),
        temperature(tail.temperature),
        maxima(static_cast<float*>(scratch)),
        sums(maxima + groups(width)),
        moments(sums + groups(width)),
        places(reinterpret_cast<uint32_t*>(moments + groups(width))) {}

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

  // Calls body(x) with the elements of the groups from `lane` on, in order. Unrolled, because the
  // loop's speed varies by a fifth with where the compiler places it.
  template <class Body>
  static void for_elements(const Bits* block, int lane, const Body& body) {
#pragma GCC unroll 16
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
      // Where a lane has a value that is not negative, its bits are the largest as they are.
      Vector<Bits> bits = load(block + element(0, lane));
      for (int i = kHalves; i < kTailElements; i += kHalves)
        bits = lanewise_max<Bits>(bits, load(block + element(i, lane)));
      if (lane_bits(bits < Vector<Bits>{})) {
        Vector<Bits> keys = broadcast(KeyLimits<Bits>::kNotSelectable);
        for (int i = 0; i < kTailElements; i += kHalves)
          keys = lanewise_max<Bits>(keys, raw_key<Format>(load(block + element(i, lane))));
        bits = raw_key<Format>(keys);  // its own inverse
      }
      const Words words = reinterpret_cast<Words>(bits);
      const Floats low = Pairs<Format>::low(words), high = Pairs<Format>::high(words);
      return maximum(maximum(low, high), lowest);
    }
  }

  // Sums the groups of a block. A group without a finite element or with -inf alone has the lowest
  // maximum and sums of 0. NaN and +inf make the sums NaN.
  void sum_block(const Bits* from, float* block_maxima, float* block_sums,
                 float* block_moments) const {
    for (int lane = 0; lane < kTailLanes; lane += kStep) {
      const Floats most = group_maxima(from, lane);
      Floats sum = {}, moment = {};
      for_elements(from, lane, [&](Floats x) {
        if constexpr (kEntropy)
          exponential.add(x - most, &sum, &moment);
        else
          sum = exponential.added(sum, x - most);
      });
      store(block_maxima + lane, most);
      store(block_sums + lane, sum);
      if constexpr (kEntropy) store(block_moments + lane, moment);
    }
  }

  void sum_next_block(const Bits* from) {
    const int64_t group = done / kTailBlock * kTailLanes;
    sum_block(from, maxima + group, sums + group, moments + group);
    done += kTailBlock;
  }

  // Sums the blocks that end at `end` or before.
  void advance(int64_t end) {
    while (done + kTailBlock <= end) sum_next_block(row + done);
  }

  // Sums all blocks that are left, elements past the end being -inf. The arithmetic is slow enough
  // for the hardware's prefetching.
  void advance_to_end() {
    advance(width);
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
        for (int j = 0; j < kTailElements; j += kHalves) {
          const int64_t id = start + element(j, group % kTailLanes);
          Bits* to = block + element(j, lanes);
          if (id + kHalves <= width)
            memcpy(to, row + id, kHalves * sizeof(Bits));
          else if (id < width)
            *to = row[id];
        }
        for (; i < count && places[i] / kTailElements == group; ++i)
          block[element(places[i] % kTailElements, lanes)] = kNegativeInfinity;
      }
      float block_maxima[kTailLanes], block_sums[kTailLanes], block_moments[kTailLanes];
      sum_block(block, block_maxima, block_sums, block_moments);
      for (int lane = 0; lane < lanes; ++lane) {
        maxima[found[lane]] = block_maxima[lane];
        sums[found[lane]] = block_sums[lane];
        if constexpr (kEntropy) moments[found[lane]] = block_moments[lane];
      }
    }
  }

  TailSums sums_of_all() const {
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
    Doubles totals[kTailLanes / kStep] = {}, moment_totals[kTailLanes / kStep] = {};
    for (int64_t i = 0; i < count; i += kTailLanes) {
      for (int lane = 0; lane < kTailLanes; lane += kStep) {
        const Floats below = load(maxima + i + lane) - most;
        const auto parts = exponential.of(below);
        const Floats weight = parts.mantissa * parts.scale;
        const Floats part = load(sums + i + lane) * weight;
        totals[lane / kStep] += __builtin_convertvector(part, Doubles);
        if constexpr (kEntropy) {
          // A group of weight 0 counts as near as one can be that has this weight.
          const Floats moment = multiply_add(load(moments + i + lane), weight,
                                             part * maximum(exponential.least, below));
          moment_totals[lane / kStep] += __builtin_convertvector(moment, Doubles);
        }
      }
    }
    double total = 0, moment = 0;
    for (int lane = 0; lane < kTailLanes; ++lane) {
      total += totals[lane / kStep][lane % kStep];
      moment += moment_totals[lane / kStep][lane % kStep];
    }
    const double log_total = std::log(total);
    // Both terms of the entropy are 0 or more.
    const double entropy = total == 0 ? 0 : log_total - moment / (total * temperature);
    return {most / static_cast<double>(temperature) + log_total, entropy};
  }
};

template <class Format, bool kEntropy>
TailSums tail_sum_with(const void* row, const TailOf& tail, void* scratch) {
  TailGroups<Format, kEntropy> groups(row, tail, scratch);
  groups.advance_to_end();
  groups.leave_out(tail.ids, tail.k);
  return groups.sums_of_all();
}

template <class Format>
TailSums tail_sum(const void* row, const TailOf& tail, void* scratch) {
  return tail.with_entropy ? tail_sum_with<Format, true>(row, tail, scratch)
                           : tail_sum_with<Format, false>(row, tail, scratch);
}

template <class Format, bool kEntropy>
TailSums select_tail_with(const void* row, int64_t limit, const uint64_t* banned, int k,
                          void* select_scratch, int32_t* ids, const TailOf& tail,
                          void* tail_scratch) {
  TailGroups<Format, kEntropy> groups(row, tail, tail_scratch);
  select_row_with<Format>(row, limit, banned, k, select_scratch, ids,
                          [&](int64_t end) { groups.advance(end); });
  groups.advance_to_end();
  groups.leave_out(tail.ids, tail.k);
  return groups.sums_of_all();
}

template <class Format>
TailSums select_tail(const void* row, int64_t limit, const uint64_t* banned, int k,
                     void* select_scratch, int32_t* ids, const TailOf& tail, void* tail_scratch) {
  const auto run = tail.with_entropy ? select_tail_with<Format, true>
                                     : select_tail_with<Format, false>;
  return run(row, limit, banned, k, select_scratch, ids, tail, tail_scratch);
}

}  // namespace
