// Exact top-K of one row with one read of the row; compiled once per instruction set.
//
// Pass 1 reduces the row to the maximum key of each group of G adjacent elements. The row's K best
// elements lie in the K best groups (ties: the lower group). So pass 2 re-reads only K * G
// elements, which are still in L2, and selects exactly among them. Both passes find the K-th
// largest key by bisection with vectorised counts. So the work hardly depends on the values: rows
// of equal, ascending and random values cost the same.
//
// Bytes: V * element for pass 1, K * G * element from cache for pass 2, scratch V / G + K * G keys.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/formats.h"

namespace opd::cpu {

// A smaller G means a smaller re-read and more groups. Groups below 16 elements would be too small
// a part of a vector to reduce. With G = 16 and K = 1024 the re-read is 11 % of V = 151936.
constexpr int kWideGroup = 64;
constexpr int kNarrowGroup = 16;
constexpr int kWideGroupMaxK = 128;

constexpr int group_size(int k) { return k <= kWideGroupMaxK ? kWideGroup : kNarrowGroup; }

constexpr size_t kScratchAlignment = 64;

constexpr size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// Bytes of scratch, aligned to kScratchAlignment, that select_row needs.
size_t select_scratch_bytes(int64_t limit, int k, int element_size);

// Writes the k best ids of [0, limit) in order (value descending, id ascending), -1 where fewer can
// be selected. `banned` holds one bit per id, padded to whole 64-bit words, or is null.
using SelectRow = void (*)(const void* row, int64_t limit, const uint64_t* banned, int k,
                           void* scratch, int32_t* ids);

}  // namespace opd::cpu
