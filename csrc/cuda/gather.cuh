// A row's values at k ids, widened to float, and the slots of the entries that are present.
//
// Each thread serves an entry, so that a warp's reads are in flight together and what it writes is
// adjacent. Bytes: an id and one sector of the row an entry, 8 written. A block serves several rows
// if k is small. Masked rows and absent ids are not read.
#pragma once

#include "../common/arguments.h"
#include "../common/values.h"
#include "device.cuh"

namespace opd::cuda {

constexpr int kGatherThreads = 128;
// Blocks that share a multiprocessor's registers. Unless told, ptxas saves registers and spills.
constexpr int kGatherBlocks = 8;

// Rows of a block.
inline int rows_of_block(int k) { return k < kGatherThreads ? kGatherThreads / k : 1; }

__global__ void __launch_bounds__(kGatherThreads, kGatherBlocks)
    gather_kernel(const __grid_constant__ GatherArgs args, int rows_of_block) {
  const int k = static_cast<int>(args.ids.width);
  const int of_row = kGatherThreads / rows_of_block;
  const int place = static_cast<int>(threadIdx.x) / of_row;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * rows_of_block + place;
  if (place >= rows_of_block || row >= args.ids.count) return;
  const bool unmasked = args.allowed.row(row);
  const char* ids = args.ids.row(row);
  const char* student = args.student.row(row);
  for (int i = static_cast<int>(threadIdx.x) % of_row; i < k; i += of_row) {
    const int64_t id = unmasked ? id_at(ids, args.ids.dtype, i) : -1;
    const bool present = args.allowed.id(id);
    args.values[row * k + i] = present ? value_at(student, args.student.dtype, id) : 0.0f;
    args.slots[row * k + i] = present ? i : -1;
  }
}

}  // namespace opd::cuda
