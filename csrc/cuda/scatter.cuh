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

// The part of a gradient's row that a block writes: elements [first, last), counted from the aligned
// address at or before the row's first element. `skip` is that element's number.
template <class Format>
struct Piece {
  using Bits = typename Format::Bits;
  Bits* start;
  int64_t skip, first, last;

  // That of `size` elements which this block has of the row.
  __device__ Piece(const Rows& out, int64_t row, int64_t size) {
    char* out_row = out.row(row);
    const int skipped_bytes = static_cast<int>(reinterpret_cast<uintptr_t>(out_row) % sizeof(uint4));
    start = reinterpret_cast<Bits*>(out_row - skipped_bytes);
    skip = skipped_bytes / static_cast<int>(sizeof(Bits));
    first = blockIdx.y * size, last = first + size;
    if (first < skip) first = skip;
    if (last > skip + out.width) last = skip + out.width;
  }
};

// Writes the entries that fall into a piece, or adds them.
template <class Format>
__device__ void write_entries(const ScatterArgs& args, int64_t row, const Piece<Format>& piece) {
  const float upstream = args.upstream[row];
  for (int i = threadIdx.x; i < args.k; i += blockDim.x) {
    const int64_t id = args.ids[row * args.k + i];
    if (id < 0 || id + piece.skip < piece.first || id + piece.skip >= piece.last) continue;
    auto& out = piece.start[id + piece.skip];
    float value = upstream * args.entry_grad[row * args.k + i];
    if (args.mode == ScatterMode::kAdd) value += Format::widen(out);
    out = Format::round(value);
  }
}

template <class Format, class Tuning = Product>
__global__ void __launch_bounds__(1024)
    scatter_kernel(const __grid_constant__ ScatterArgs args, int64_t size) {
  const int64_t row = blockIdx.x;
  const Piece<Format> piece(args.out, row, size);
  if (args.mode == ScatterMode::kClear) {
    clear<Tuning>(piece.start, piece.first, piece.last);
    __syncthreads();  // another thread wrote the zero at an entry
  }
  write_entries(args, row, piece);
}

}  // namespace opd::cuda
