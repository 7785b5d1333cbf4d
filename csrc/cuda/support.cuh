// A row's given support: its entries in shared memory, and repeated ids, which sorting brings
// together.
#pragma once

#include "../common/divergence.h"
#include "block.cuh"
#include "plan.h"

namespace opd::cuda {

// Bytes of shared memory for a given support: ranks to sort by, entries, scratch.
inline int support_bytes(int k) {
  return next_power_of_2(k) * static_cast<int>(sizeof(uint64_t)) +
         3 * k * static_cast<int>(sizeof(float)) + Block::kScratchBytes;
}

// Blocks that share a multiprocessor's registers. For more blocks ptxas would spill.
constexpr int kSupportBlocks = 8;

struct Support {
  int size;  // of the ranks, a power of two
  uint64_t* ranks;
  Entries entries;
  char* scratch;

  __device__ explicit Support(int k) : size(1), ranks(reinterpret_cast<uint64_t*>(shared_memory())) {
    while (size < k) size *= 2;
    auto* ids = reinterpret_cast<int32_t*>(ranks + size);
    auto* student = reinterpret_cast<float*>(ids + k);
    entries = {ids, student, student + k};
    scratch = reinterpret_cast<char*>(student + 2 * k);
  }
};

// Writes the results of a masked row, which is not read.
__device__ inline void write_masked_row(const Block& block, const DivergenceArgs& args,
                                        int64_t row) {
  block.for_entries(args.k, [&](int i) {
    args.out_ids[row * args.k + i] = -1;
    args.entry_grad[row * args.k + i] = 0;
  });
  if (block.thread == 0) args.loss[row] = 0;
}

// Reads the entries of a row, absent ones as (-1, -inf).
__device__ inline void read_support(const Block& block, const DivergenceArgs& args, int64_t row,
                                    int k, const Entries& entries) {
  const char* given_ids = args.ids.row(row);
  const char* given_values = args.teacher.row(row);
  block.for_entries(k, [&](int i) {
    const int64_t id = id_at(given_ids, args.ids.dtype, i);
    const bool allowed = args.allowed.id(id);
    entries.ids[i] = allowed ? static_cast<int32_t>(id) : -1;
    entries.teacher[i] = allowed ? value_at(given_values, args.teacher.dtype, i) : -INFINITY;
  });
}

// Writes ids and gradients, which are in entries.student. The gradients of a repeated id are added
// into its first entry, and its other entries become absent, so that scatter can assign.
__device__ inline void write_merged(const Block& block, const Support& support, int k,
                                    int32_t* out_ids, float* out_grad) {
  const int size = support.size;
  uint64_t* ranks = support.ranks;
  const Entries& entries = support.entries;
  // Present entries by (id, place), before the absent ones.
  for (int i = block.thread; i < size; i += block.threads) {
    const bool present = i < k && entries.ids[i] >= 0;
    ranks[i] =
        present ? ~(static_cast<uint64_t>(entries.ids[i]) << 32 | static_cast<uint32_t>(i)) : 0;
    if (i < k && !present) out_ids[i] = -1, out_grad[i] = 0;
  }
  __syncthreads();  // all ranks and gradients are written
  sort_descending(block, ranks, size);
  for (int i = block.thread; i < size && ranks[i] != 0; i += block.threads) {
    const uint32_t id = ~ranks[i] >> 32;
    if (i > 0 && ~ranks[i - 1] >> 32 == id) continue;  // not the first of its id
    const auto first = static_cast<uint32_t>(~ranks[i]);
    double sum = entries.student[first];
    for (int j = i + 1; j < size && ranks[j] != 0 && ~ranks[j] >> 32 == id; ++j) {
      const auto repeat = static_cast<uint32_t>(~ranks[j]);
      sum += entries.student[repeat];
      out_ids[repeat] = -1;
      out_grad[repeat] = 0;
    }
    out_ids[first] = static_cast<int32_t>(id);
    out_grad[first] = finite(sum);
  }
}

}  // namespace opd::cuda
