// Exchanges between the threads of a block: sums, maxima, running counts.
//
// Each exchange has one barrier, and two buffers take turns. A thread writes a buffer again only
// after the barrier of the exchange in between, which every thread reaches after reading the
// buffer.
#pragma once

#include "device.cuh"

namespace opd::cuda {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarp;
// Floats are summed over this many threads in every block, so that a sum has the same bits for
// every number of threads. No block has fewer threads.
constexpr int kEntryThreads = 128;

class Block {
 public:
  using Real = float;  // what it sums in
  static constexpr int kWordsOfWarp = 4;  // words that a warp exchanges at once
  static constexpr int kScratchBytes = 2 * kMaxWarps * kWordsOfWarp * sizeof(uint32_t);

  __device__ explicit Block(char* scratch)
      : thread(threadIdx.x),
        threads(blockDim.x),
        lane(threadIdx.x % kWarp),
        warp(threadIdx.x / kWarp),
        warps(blockDim.x / kWarp),
        scratch_(reinterpret_cast<uint32_t*>(scratch)) {}

  const int thread, threads, lane, warp, warps;

  // The sum over all threads.
  __device__ int sum(int value) {
    const unsigned of_warp = __reduce_add_sync(kAllLanes, static_cast<unsigned>(value));
    const uint32_t* all = exchange(&of_warp, 1);
    return __reduce_add_sync(kAllLanes, lane < warps ? all[lane] : 0u);
  }

  // The least and the largest of a value over all threads.
  __device__ void range(int& least, int& largest) {
    const uint32_t of_warp[] = {static_cast<uint32_t>(__reduce_min_sync(kAllLanes, least)),
                                static_cast<uint32_t>(__reduce_max_sync(kAllLanes, largest))};
    const uint32_t* all = exchange(of_warp, 2);
    const int from = lane < warps ? lane : 0;
    least = __reduce_min_sync(kAllLanes, static_cast<int>(all[from]));
    largest = __reduce_max_sync(kAllLanes, static_cast<int>(all[kMaxWarps + from]));
  }

  // The sum over the warps before this one, and the sum over all warps.
  __device__ void sums_of_warps(unsigned value, unsigned& before, unsigned& total) {
    const unsigned of_warp = __reduce_add_sync(kAllLanes, value);
    const uint32_t* all = exchange(&of_warp, 1);
    const unsigned other = lane < warps ? all[lane] : 0u;
    before = __reduce_add_sync(kAllLanes, lane < warp ? other : 0u);
    total = __reduce_add_sync(kAllLanes, other);
  }

  // Calls body(i) for the entries of this thread.
  template <class Body>
  __device__ void for_entries(int k, const Body& body) const {
    if (thread < kEntryThreads)
      for (int i = thread; i < k; i += kEntryThreads) body(i);
  }

  // Calls each step(i, note) in turn for the entries of this thread.
  template <class... Steps>
  __device__ void in_steps(int k, const Steps&... steps) const {
    for_entries(k, [&](int i) {
      float note;
      (steps(i, note), ...);
    });
  }

  // Combines a struct of up to four 32-bit members over the first kEntryThreads threads, in an
  // order that does not depend on the number of threads.
  template <class Value, class Combine>
  __device__ Value combine(Value value, Combine combine) {
    constexpr int kWords = sizeof(Value) / sizeof(uint32_t);
    static_assert(kWords <= kWordsOfWarp && sizeof(Value) % sizeof(uint32_t) == 0, "");
    uint32_t words[kWords];
    for (int other = kWarp / 2; other > 0; other /= 2) {
      memcpy(words, &value, sizeof value);
      for (uint32_t& word : words) word = __shfl_xor_sync(kAllLanes, word, other);
      Value theirs;
      memcpy(&theirs, words, sizeof theirs);
      value = combine(value, theirs);
    }
    memcpy(words, &value, sizeof value);
    const uint32_t* all = exchange(words, kWords);
    for (int from = 0; from < kEntryThreads / kWarp; ++from) {
      for (int i = 0; i < kWords; ++i) words[i] = all[i * kMaxWarps + from];
      Value theirs;
      memcpy(&theirs, words, sizeof theirs);
      value = from == 0 ? theirs : combine(value, theirs);
    }
    return value;
  }

 private:
  // Word i of warp w is at [i * kMaxWarps + w] of the result.
  __device__ const uint32_t* exchange(const uint32_t* words, int count) {
    uint32_t* buffer = scratch_ + turn_ * (kMaxWarps * kWordsOfWarp);
    turn_ ^= 1;
    if (lane == 0)
      for (int i = 0; i < count; ++i) buffer[i * kMaxWarps + warp] = words[i];
    __syncthreads();
    return buffer;
  }

  uint32_t* scratch_;
  int turn_ = 0;
};

// Sorts `count` different integers, at most one per thread, into descending order: an integer's
// place is the number of larger ones. The caller has a barrier before it; it ends with one.
__device__ inline void place_descending(const Block& block, uint64_t* values, int count) {
  uint64_t mine = 0;
  int place = 0;
  if (block.thread < count) {
    mine = values[block.thread];
    for (int i = 0; i < count; ++i) place += values[i] > mine;
  }
  __syncthreads();  // all have read
  if (block.thread < count) values[place] = mine;
  __syncthreads();
}

// Sorts `size` integers, a power of two, into descending order by a bitonic network. Steps stay
// within a warp's 64 elements where they can. The caller has a barrier before it; it ends with one.
__device__ inline void sort_descending(const Block& block, uint64_t* values, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int pair = block.thread; pair < size / 2; pair += block.threads) {
        const int low = 2 * pair - (pair & (stride - 1)), high = low + stride;
        const bool descending = (low & run) == 0;
        const uint64_t a = values[low], b = values[high];
        if ((a < b) == descending) {
          values[low] = b;
          values[high] = a;
        }
      }
      // The next step, or the reader of the result, reads what this step wrote: in the same warp or
      // in others.
      const int next = stride > 1 ? stride / 2 : run < size ? run : kMaxThreads;
      if (stride > kWarp || next > kWarp) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    }
  }
}

}  // namespace opd::cuda
