// The shape of a launch, in one place: sizes of groups and blocks, given k, a row and the device.
//
// Small groups mean more group keys to search. Large groups mean more elements to read a second
// time, k groups of them: 1.3 % of a row of 150 000 at k = 64, 10 % at 1024. Blocks are small if
// there are enough rows to fill a multiprocessor with blocks at different stages, otherwise large.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "block.cuh"
#include "kernels.h"

namespace opd::cuda {

// A row is cut from a multiple of 128 bytes on, the line size of the cache. A chunk is 16 bytes,
// one load of a thread. A tile is one load of a warp. A group is a power of two of chunks in a
// tile.
constexpr int kAlignment = 128;
constexpr int kChunkBytes = 16;
constexpr int kTileBytes = kChunkBytes * kWarp;
constexpr int kLaneBits = 5;  // 2^5 lanes of a warp
// Tiles that a warp loads at once: a block of 128 threads has 16 kB in flight.
constexpr int kTilesAtOnce = 8;
// Threads that keep a multiprocessor's memory busy, and the most keys that a thread should search.
constexpr int kThreadsOfMultiprocessor = 1024;
constexpr int kKeysOfThread = 64;
// Shared memory that every architecture from 8.0 on has for one block, less what is not for keys.
constexpr int kMostKeyBytes = 76 * 1024;
constexpr int kSharedOverhead = 1024;  // of each block
constexpr int kLeastCandidates = 128;
// An entry of a row's divergence: id, student, teacher.
constexpr int kEntryBytes = 3 * sizeof(int32_t);

struct Plan {
  int lane_bits;     // a group is 2^lane_bits chunks
  int threads;       // of a block
  int cluster;       // blocks of a row
  int candidates;    // that there is room to sort
  int key_bytes;     // of shared memory
  int shared_bytes;  // of all parts
};

inline int div_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

inline int next_power_of_2(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

inline int largest_group(int k) { return k <= 256 ? 32 : 16; }

// Tiles of a row, wherever it begins.
inline int most_tiles(int64_t width, int size) {
  return div_up(width * size + kAlignment - size, kTileBytes);
}

// Bytes for the group keys or for the keys of the elements of k groups, in whole vectors.
inline int64_t key_bytes(int64_t width, int k, int size, int lane_bits) {
  const int64_t tiles = most_tiles(width, size);
  const int64_t groups = tiles << (kLaneBits - lane_bits);
  const int64_t elements = std::min<int64_t>(groups, k) << lane_bits;  // in chunks
  return std::max<int64_t>((groups * size + kChunkBytes - 1) / kChunkBytes, elements) * kChunkBytes;
}

// The smallest groups, from the size for this k on, whose keys fit into shared memory; -1 if none
// do.
inline int lane_bits(int64_t width, int k, int size) {
  int bits = 0;
  while ((kChunkBytes / size) << bits < largest_group(k)) ++bits;
  for (; bits <= kLaneBits; ++bits) {
    if (((width * size / kTileBytes + 2) << (kLaneBits - bits)) * size > kMostKeyBytes) continue;
    return key_bytes(width, k, size, bits) <= kMostKeyBytes ? bits : -1;
  }
  return -1;
}

// Shared memory for a selection, of which lane_bits is -1 if it does not fit.
inline Plan plan_memory(int64_t width, int k, int size) {
  Plan plan{};
  plan.lane_bits = lane_bits(width, k, size);
  if (plan.lane_bits < 0) return plan;
  plan.key_bytes = static_cast<int>(key_bytes(width, k, size, plan.lane_bits));
  // The entries' ids and values take the keys' place.
  plan.key_bytes = std::max(plan.key_bytes, div_up(kEntryBytes * k, kChunkBytes) * kChunkBytes);
  // In ordinary rows, few more than k elements reach the smallest of the k group keys.
  plan.candidates = std::max(2 * next_power_of_2(k), kLeastCandidates);
  plan.shared_bytes = plan.key_bytes + plan.candidates * static_cast<int>(sizeof(uint64_t)) +
                      Block::kScratchBytes + (k + 1) * static_cast<int>(sizeof(int32_t));
  return plan;
}

// Sizes of blocks and clusters for so many rows of so many tiles, given the shared memory.
inline void plan_blocks(int64_t rows, int tiles, int size, const Device& device, Plan& plan) {
  const int rows_of_multiprocessor = div_up(rows, device.multiprocessors);
  int wanted = kThreadsOfMultiprocessor / std::max(rows_of_multiprocessor, 1);
  wanted = std::min(wanted, tiles * kWarp);  // a tile for each warp
  wanted = std::max(wanted, plan.key_bytes / size / kKeysOfThread);
  plan.threads = kEntryThreads;
  while (plan.threads < kMaxThreads && plan.threads * 2 <= wanted) plan.threads *= 2;
  // If shared memory holds few blocks, they are larger.
  const int blocks = std::max(device.shared_bytes / (plan.shared_bytes + kSharedOverhead), 1);
  while (plan.threads < kMaxThreads && plan.threads * blocks < kThreadsOfMultiprocessor)
    plan.threads *= 2;
  plan.cluster = 1;
  // All clusters run at once, and each warp has a tile.
  for (int size = 2; size <= kMaxCluster; ++size)
    if (rows <= device.clusters[size - 2] && tiles >= size * (plan.threads / kWarp))
      plan.cluster = size;
}

inline Plan plan_selection(int64_t rows, int64_t width, int k, DType dtype, const Device& device) {
  const int size = element_size(dtype);
  Plan plan = plan_memory(width, k, size);
  if (plan.lane_bits < 0)
    throw std::invalid_argument("rows of " + std::to_string(width) + " elements do not fit");
  plan_blocks(rows, div_up(width * size, kTileBytes), size, device, plan);
  return plan;
}

// A tail's groups are 64 elements, or up to a tile where their sums would take more shared memory
// than 24 kB, or 12 kB beside float32 keys. They do not depend on k, nor on what is asked for beside
// the log-sum-exp: its bits must not. Rows of more tiles than kSegmentTiles are summed by several
// launches.
constexpr int kTailElements = 64;
constexpr int kMostTailBytes = 48 * 1024;  // times bytes of an element
constexpr int kSegmentTiles = 4096;

struct TailPlan {
  Plan selection;  // and the sizes of blocks; of no keys if nothing is selected
  int lane_bits;   // a group of the tail is 2^lane_bits chunks
  int offset;      // of the sums in shared memory, after what is the selection's
  int groups;      // that there is room for
  int first;       // tile of this launch
};

// Bytes of a group: its maximum, its sum and the moment sum of the entropy.
inline int tail_group_bytes(int size, bool entropy) {
  return size + static_cast<int>(sizeof(float)) * (entropy ? 2 : 1);
}

inline int tail_lane_bits(int64_t width, int size) {
  const int64_t tiles = most_tiles(width, size);
  int bits = 0;
  while ((kChunkBytes / size) << bits < kTailElements) ++bits;
  while (bits < kLaneBits &&
         (tiles << (kLaneBits - bits)) * tail_group_bytes(size, true) > kMostTailBytes / size)
    ++bits;
  return bits;
}

// `listed` is how many ids are left out. Shared memory is too large if the selection of k does not
// fit beside the tail.
inline TailPlan plan_tail(const SelectWithTailArgs& args, int listed, const Device& device) {
  const SelectArgs& select = args.select;
  const int64_t rows = select.logits.count, width = args.tail.width;
  const int size = element_size(select.logits.dtype);
  TailPlan plan{};
  plan.lane_bits = tail_lane_bits(width, size);
  const int tiles = most_tiles(width, size);
  plan.groups = std::min(tiles, kSegmentTiles) << (kLaneBits - plan.lane_bits);
  Plan& selection = plan.selection;
  if (select.k > 0) {
    // In a row of one segment, the selection's groups are no larger than the tail's.
    selection = plan_memory(select.allowed.limit, select.k, size);
    if (tiles > kSegmentTiles || selection.lane_bits < 0) selection.shared_bytes = kMostShared;
  } else {
    selection.shared_bytes = Block::kScratchBytes + static_cast<int>(sizeof(int32_t));
  }
  const int room = next_power_of_2(std::max(listed, 1));  // to sort the ids
  if (room > selection.candidates) {
    selection.shared_bytes +=
        (room - selection.candidates) * static_cast<int>(sizeof(uint64_t));
    selection.candidates = room;
  }
  plan.offset = div_up(selection.shared_bytes, kChunkBytes) * kChunkBytes;
  selection.shared_bytes =
      plan.offset + plan.groups * tail_group_bytes(size, args.tail.entropy != nullptr);
  plan_blocks(rows, std::min(tiles, kSegmentTiles), size, device, selection);
  return plan;
}

}  // namespace opd::cuda
