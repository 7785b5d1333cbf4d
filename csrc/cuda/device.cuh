// Hardware operations for which CUDA C++ has no names, or only in large headers.
//
// nvcc compiles the kernels, and so does g++ with OPD_EMULATION. Then emulation.h stands in for the
// language and for the functions of the second branch below.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/formats.h"

#if defined(OPD_EMULATION)
#include "emulation.h"
#endif

namespace opd::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#if defined(OPD_EMULATION)

using emulation::cluster_rank;
using emulation::cluster_size;
using emulation::in_leader;
using emulation::prefetch;
using emulation::shared_memory;
using emulation::word_max;

#else

// The larger of two floats, or of each of two pairs of halves; NaN if one is NaN.
template <class Format>
__device__ uint32_t word_max(uint32_t a, uint32_t b);

template <>
__device__ inline uint32_t word_max<Float32>(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("{.reg .f32 x, y, z; mov.b32 x, %1; mov.b32 y, %2; max.NaN.f32 z, x, y; mov.b32 %0, z;}"
      : "=r"(larger)
      : "r"(a), "r"(b));
  return larger;
}

template <>
__device__ inline uint32_t word_max<Float16>(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

template <>
__device__ inline uint32_t word_max<BFloat16>(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

__device__ inline char* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

// Loads the line at an address of global memory into the L2 cache.
__device__ inline void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Clusters: blocks that run together and write into each other's shared memory. Code for a compute
// capability below 9.0 has none. There each block is a cluster of one, and blocks that were meant
// to form a cluster all do the same work.
#if __CUDA_ARCH__ >= 900

__device__ inline int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

__device__ inline void cluster_barrier() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// The two halves of a barrier. This arrive orders no memory accesses: it says that the block runs.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::);
}

__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same address in the shared memory of the cluster's first block.
template <class T>
__device__ inline T* in_leader(T* own) {
  uint64_t leaders;
  asm("mapa.u64 %0, %1, 0;" : "=l"(leaders) : "l"(own));
  return reinterpret_cast<T*>(leaders);
}

#else

__device__ inline int cluster_rank() { return 0; }
__device__ inline int cluster_size() { return 1; }
__device__ inline void cluster_barrier() {}
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_wait() {}
template <class T>
__device__ inline T* in_leader(T* own) {
  return own;
}

#endif
#endif

}  // namespace opd::cuda
