// The renormalised reverse KL of each row and its entry gradients.
//
// If the teacher is logits, the same kernel selects the row's support first. It reads the teacher's
// row once, then k of the student's values, and writes nothing of the vocabulary's size. If the
// support is given, a row costs its k entries, and repeated ids are merged. One thread keeps an
// entry from reading to writing, so that only sums need barriers.
#pragma once

#include "../common/divergence.h"
#include "select.cuh"
#include "support.cuh"

namespace opd::cuda {

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
                                       plan.lane_bits, expect, KeysAlone{});
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

// Divergence on a given support, in any order. A block serves one row.
__global__ void __launch_bounds__(kEntryThreads, kSupportBlocks)
    support_divergence_kernel(const __grid_constant__ DivergenceArgs args) {
  const int64_t row = blockIdx.x;
  const int k = args.k;
  const Support support(k);
  Block block(support.scratch);
  if (!args.allowed.row(row)) return write_masked_row(block, args, row);
  read_support(block, args, row, k, support.entries);
  const float loss = row_divergence(block, support.entries, k, args.student.row(row),
                                    args.student.dtype, args.objective, row);
  if (block.thread == 0) args.loss[row] = loss;
  write_merged(block, support, k, args.out_ids + row * k, args.entry_grad + row * k);
}

}  // namespace opd::cuda
