// The dense gradient of a row from its k entries, written once.
//
// A block serves one piece of a row. It writes zeros by 16-byte stores, waits at a barrier, then
// writes the entries that fall into the piece, while its lines are in the cache. Bytes: V elements
// written, k ids and gradients read. If the memory holds zeros or a gradient to add to, only the
// entries are written.
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
  // Less than a chunk is left at either end. A row may end in the chunk in which it begins.
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
  char* out_row = args.out.row(row);
  const int skipped_bytes = static_cast<int>(reinterpret_cast<uintptr_t>(out_row) % sizeof(uint4));
  auto* start = reinterpret_cast<Bits*>(out_row - skipped_bytes);
  const int64_t skip = skipped_bytes / static_cast<int>(sizeof(Bits));
  int64_t first = blockIdx.y * piece, last = first + piece;
  if (first < skip) first = skip;
  if (last > skip + args.out.width) last = skip + args.out.width;
  if (args.mode == ScatterMode::kClear) {
    clear<Tuning>(start, first, last);
    __syncthreads();  // another thread wrote the zero at an entry
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
