// The renormalised reverse KL of each row and its entry gradients.
//
// If the teacher is logits, the same kernel selects the row's support first. It reads the teacher's
// row once, then k of the student's values, and writes nothing of the vocabulary's size. If the
// support is given, a row costs its k entries, and repeated ids are merged. One thread keeps an
// entry from reading to writing, so that only sums need barriers.
#pragma once

#include "../common/divergence.h"
#include "select.cuh"

namespace opd::cuda {

// Writes the results of a masked row, which is not read.
__device__ inline void write_masked_row(const Block& block, const DivergenceArgs& args,
                                        int64_t row) {
  block.for_entries(args.k, [&](int i) {
    args.out_ids[row * args.k + i] = -1;
    args.entry_grad[row * args.k + i] = 0;
  });
  if (block.thread == 0) args.loss[row] = 0;
}

// Selection and divergence against a teacher's logits. A block or a cluster serves one row.
template <class Format, class Tuning = Product>
__global__ void __launch_bounds__(kMaxThreads, 1)
    divergence_kernel(const __grid_constant__ DivergenceArgs args,
                      const __grid_constant__ Plan plan) {
  const int64_t row = blockIdx.x / plan.cluster;
  const int k = args.k;
  const Shared<Format> shared(plan, k);
  Block block(shared.scratch);
  if (!args.allowed.row(row)) {
    if (cluster_rank() == 0) write_masked_row(block, args, row);
    return;
  }
  // The student's values are fetched while candidates are put in order.
  const char* student_row = args.student.row(row);
  const int64_t student_size = element_size(args.student.dtype);
  const auto expect = [&](int id) { prefetch(student_row + id * student_size); };
  const int found = select_row<Tuning>(block, shared, args.teacher.row(row), args.allowed, k,
                                       plan.lane_bits, expect);
  if (found < 0) return;
  auto* ids = reinterpret_cast<int32_t*>(shared.keys);  // the keys are no longer needed
  auto* student = reinterpret_cast<float*>(ids + k);
  const Entries entries{ids, student, student + k};
  block.for_entries(k, [&](int i) {
    entries.ids[i] = i < found ? shared.id(i) : -1;
    entries.teacher[i] = i < found ? shared.value(i) : -INFINITY;
  });
  const float loss =
      row_divergence(block, entries, k, student_row, args.student.dtype, args.objective, row);
  block.for_entries(k, [&](int i) {
    args.out_ids[row * k + i] = entries.ids[i];
    args.entry_grad[row * k + i] = entries.student[i];
  });
  if (block.thread == 0) args.loss[row] = loss;
}

// Bytes of shared memory for a given support: ranks to sort by, entries, scratch.
inline int support_bytes(int k) {
  return next_power_of_2(k) * static_cast<int>(sizeof(uint64_t)) +
         3 * k * static_cast<int>(sizeof(float)) + Block::kScratchBytes;
}

// Blocks that share a multiprocessor's registers. For more blocks ptxas would spill.
constexpr int kSupportBlocks = 8;

// Divergence on a given support, in any order. A block serves one row. The gradients of a repeated
// id are added into its first entry, and its other entries become absent, so that scatter can
// assign.
__global__ void __launch_bounds__(kEntryThreads, kSupportBlocks)
    support_divergence_kernel(const __grid_constant__ DivergenceArgs args) {
  const int64_t row = blockIdx.x;
  const int k = args.k;
  int size = 1;
  while (size < k) size *= 2;
  auto* ranks = reinterpret_cast<uint64_t*>(shared_memory());
  auto* ids = reinterpret_cast<int32_t*>(ranks + size);
  auto* student = reinterpret_cast<float*>(ids + k);
  const Entries entries{ids, student, student + k};
  Block block(reinterpret_cast<char*>(student + 2 * k));
  if (!args.allowed.row(row)) return write_masked_row(block, args, row);

  const char* given_ids = args.ids.row(row);
  const char* given_values = args.teacher.row(row);
  block.for_entries(k, [&](int i) {
    const int64_t id = id_at(given_ids, args.ids.dtype, i);
    const bool allowed = args.allowed.id(id);
    entries.ids[i] = allowed ? static_cast<int32_t>(id) : -1;
    entries.teacher[i] = allowed ? value_at(given_values, args.teacher.dtype, i) : -INFINITY;
  });
  const float loss = row_divergence(block, entries, k, args.student.row(row), args.student.dtype,
                                    args.objective, row);
  if (block.thread == 0) args.loss[row] = loss;

  // Present entries by (id, place), before the absent ones.
  int32_t* out_ids = args.out_ids + row * k;
  float* out_grad = args.entry_grad + row * k;
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
