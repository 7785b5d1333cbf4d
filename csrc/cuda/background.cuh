// The dense gradient of a row with a background: factor softmax(z / T), and its k entries.
//
// A block serves one piece of a row, as in scatter.cuh. In one pass it reads the student's logits
// and writes the background, 16 bytes at a time, which may be the same memory. It waits at a
// barrier, then writes the entries, while their lines are in the cache. Bytes: V elements read and
// written, k ids and gradients read. A row without a background is cleared and not read.
//
// Rows begin at any element, logits and gradient each at their own. Stores are aligned; where loads
// would then not be, a chunk is cut out of two that are.
#pragma once

#include "../common/softmax.h"
#include "scatter.cuh"

namespace opd::cuda {

constexpr int kBackgroundThreads = 128;
// Blocks that share a multiprocessor's registers. For more, ptxas would load chunks one by one.
constexpr int kBackgroundBlocks = 8;

template <class Format>
struct Background {
  static constexpr float kLog2E = 1.44269504f;
  float middle, factor, scale;

  // A temperature is a normal float, so that the factor is neither 0 nor infinite.
  __device__ explicit Background(const Softmax& softmax)
      : middle(softmax.middle),
        factor(kLog2E / softmax.temperature),
        scale(softmax.scale) {}

  // p exceeds 1, and may be infinite, where an entry is written next.
  __device__ float of(float z) const { return power_of_2((z - middle) * factor) * scale; }

  __device__ uint32_t of_word(uint32_t word) const {
    constexpr int kNumbers = sizeof word / sizeof(typename Format::Bits);
    float values[kNumbers];
    for (int i = 0; i < kNumbers; ++i) values[i] = of(word_value(word, i, Format{}));
    return round_word<Format>(values);
  }

  __device__ uint4 of_chunk(const uint4& chunk) const {
    return {of_word(chunk.x), of_word(chunk.y), of_word(chunk.z), of_word(chunk.w)};
  }
};

// 16 bytes from byte `shift` of two chunks on; it is even, and less than 16.
__device__ inline uint4 cut(const uint4& a, const uint4& b, int shift) {
  uint32_t words[] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  if (shift & 8)
    for (int i = 0; i < 6; ++i) words[i] = words[i + 2];
  if (shift & 4)
    for (int i = 0; i < 5; ++i) words[i] = words[i + 1];
  const unsigned bytes = shift & 2 ? 0x5432 : 0x3210;
  return {__byte_perm(words[0], words[1], bytes), __byte_perm(words[1], words[2], bytes),
          __byte_perm(words[2], words[3], bytes), __byte_perm(words[3], words[4], bytes)};
}

// Writes kCount chunks, one for each turn of the block's threads.
template <int kCount, bool kShifted, class Tuning, class Format>
__device__ void write_turns(const Background<Format>& background, const uint4* from, int shift,
                            uint4* to) {
  uint4 chunks[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) chunks[i] = Tuning::load(from + i * kBackgroundThreads);
  if constexpr (kShifted) {
    uint4 next[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) next[i] = Tuning::load(from + i * kBackgroundThreads + 1);
#pragma unroll
    for (int i = 0; i < kCount; ++i) chunks[i] = cut(chunks[i], next[i], shift);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    Tuning::store(to + i * kBackgroundThreads, background.of_chunk(chunks[i]));
}

// Writes the chunks [begin, end) of a piece. `from` is aligned, and chunk 0 of the logits begins at
// its byte `shift`. Where that is not 0, the chunk behind the last one is read as well.
template <bool kShifted, class Tuning, class Format>
__device__ void write_chunks(const Background<Format>& background, const uint4* from, int shift,
                             int begin, int end, uint4* to) {
  constexpr int kTurns = kShifted ? 2 : 4, kStep = kTurns * kBackgroundThreads;
  int i = begin + static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (; i + kStep - kBackgroundThreads < end; i += kStep)
    write_turns<kTurns, kShifted, Tuning>(background, from + i, shift, to + i);
#pragma unroll 1
  for (; i < end; i += kBackgroundThreads)
    write_turns<1, kShifted, Tuning>(background, from + i, shift, to + i);
}

// Writes the elements [first, last) of a piece. Counting begins where `to` points, which is
// aligned, and where `from` does, which may lie before the row.
template <class Tuning, class Format>
__device__ void write_background(const Background<Format>& background,
                                 const typename Format::Bits* from, int first, int last,
                                 typename Format::Bits* to) {
  using Bits = typename Format::Bits;
  constexpr int kChunk = sizeof(uint4) / sizeof(Bits);
  const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(from) % sizeof(uint4));
  const int ahead = shift / static_cast<int>(sizeof(Bits));
  const auto* aligned = reinterpret_cast<const uint4*>(from - ahead);
  auto* chunks = reinterpret_cast<uint4*>(to);
  // Chunks that are read and written with all their elements.
  const int begin = (first + ahead + kChunk - 1) / kChunk;
  const int end = max(begin, (last + ahead) / kChunk - (shift > 0));
  if (shift > 0)
    write_chunks<true, Tuning>(background, aligned, shift, begin, end, chunks);
  else
    write_chunks<false, Tuning>(background, aligned, 0, begin, end, chunks);
  // Less than two chunks are left at either end.
  const auto write = [&](int i) { to[i] = Format::round(background.of(Format::widen(from[i]))); };
  const int head = first + static_cast<int>(threadIdx.x);
  const int tail = end * kChunk + static_cast<int>(threadIdx.x);
  if (head < begin * kChunk && head < last) write(head);
  if (tail < last) write(tail);
}

template <class Format, class Tuning = Product>
__global__ void __launch_bounds__(kBackgroundThreads, kBackgroundBlocks)
    background_kernel(const __grid_constant__ BackgroundArgs args, int64_t size) {
  using Bits = typename Format::Bits;
  const ScatterArgs& to = args.scatter;
  const int64_t row = blockIdx.x;
  const Piece<Format> piece(to.out, row, size);
  const auto* logits = reinterpret_cast<const Bits*>(args.logits.row(row));
  const float upstream = to.upstream[row], factor = args.factors[row];
  int64_t written = piece.first;
  if (has_background(upstream, factor)) {
    const Background<Format> background(
        softmax_of(upstream, factor, args.logsumexp[row], args.temperature.at(row)));
    const int64_t base = blockIdx.y * size;  // a multiple of chunks
    written = min(max(piece.first, piece.skip + args.limit), piece.last);
    write_background<Tuning>(background, logits - piece.skip + base,
                             static_cast<int>(piece.first - base),
                             static_cast<int>(written - base), piece.start + base);
  }
  clear<Tuning>(piece.start, written, piece.last);
  __syncthreads();  // another thread wrote the background at an entry
  write_entries(to, row, piece);
}

}  // namespace opd::cuda
