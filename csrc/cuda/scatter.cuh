// The dense gradient of a row from its k entries, written once.
//
// A block for each row and piece of it: zeros by 16-byte stores, a barrier, then the entries that
// fall into the piece, while its lines are in the cache. Bytes: V elements written, k ids and
// gradients read. To zeros that are there already, and to a gradient that is added to, entries
// alone go.
#pragma once

#include "../common/arguments.h"
#include "device.cuh"
#include "tuning.cuh"

namespace opd::cuda {

// Zeros at the elements [first, last), counted from an address that is a multiple of 16.
template <class Tuning, class Bits>
__device__ void clear(Bits* start, int64_t first, int64_t last) {
  constexpr int kChunk = sizeof(uint4) / sizeof(Bits);
  const int64_t body = (first + kChunk - 1) / kChunk, end = last / kChunk;
  for (int64_t i = body + threadIdx.x; i < end; i += blockDim.x)
    Tuning::store(reinterpret_cast<uint4*>(start) + i, uint4{0, 0, 0, 0});
  // What is left at either end is less than a chunk; a row may end in the chunk that it begins in.
  const int64_t head = first + threadIdx.x, tail = (end > body ? end : body) * kChunk + threadIdx.x;
  if (head < body * kChunk && head < last) start[head] = 0;
  if (tail < last) start[tail] = 0;
}

// Pieces of `piece` elements are counted from the aligned address at or before a row's first
// element.
template <class Format, class Tuning = Product>
__global__ void __launch_bounds__(1024)
    scatter_kernel(const __grid_constant__ ScatterArgs args, int64_t piece) {
  using Bits = typename Format::Bits;
  const int64_t row = blockIdx.x;
  char* at = args.out.row(row);
  const int skipped_bytes = static_cast<int>(reinterpret_cast<uintptr_t>(at) % sizeof(uint4));
  auto* start = reinterpret_cast<Bits*>(at - skipped_bytes);
  const int64_t skip = skipped_bytes / static_cast<int>(sizeof(Bits));
  int64_t first = blockIdx.y * piece, last = first + piece;
  if (first < skip) first = skip;
  if (last > skip + args.out.width) last = skip + args.out.width;
  if (args.mode == ScatterMode::kClear) {
    clear<Tuning>(start, first, last);
    __syncthreads();  // an entry's zero was written by another thread
  }
  const float upstream = args.upstream[row];
  for (int i = threadIdx.x; i < args.k; i += blockDim.x) {
    const int64_t id = args.ids[row * args.k + i];
    if (id < 0 || id + skip < first || id + skip >= last) continue;
    Bits& out = start[id + skip];
    float value = upstream * args.entry_grad[row * args.k + i];
    if (args.mode == ScatterMode::kAdd) value += Format::widen(out);
    out = Format::round(value);
  }
}

}  // namespace opd::cuda
