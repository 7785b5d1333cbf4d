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
using emulation::power_of_2;
using emulation::prefetch;
using emulation::round_word;
using emulation::shared_memory;
using emulation::widen_half;
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

// 2^x with a relative error of 2^-22; 0 where that is below 2^-126.
__device__ inline float power_of_2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// The value of a float16, in one instruction.
__device__ inline float widen_half(uint32_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
  return value;
}

// The word that holds one or two floats, rounded to nearest, ties to even. NaN is 0x7fff.
template <class Format>
__device__ uint32_t round_word(const float* values);

template <>
__device__ inline uint32_t round_word<Float32>(const float* values) {
  return float_to_bits(values[0]);
}

template <>
__device__ inline uint32_t round_word<Float16>(const float* values) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(word) : "f"(values[0]), "f"(values[1]));
  return word;
}

template <>
__device__ inline uint32_t round_word<BFloat16>(const float* values) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(word) : "f"(values[0]), "f"(values[1]));
  return word;
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

// The value in a word, of 16-bit formats that in its lower half (0) or upper half (1).
__device__ inline float word_value(uint32_t word, int, Float32) { return bits_to_float(word); }
__device__ inline float word_value(uint32_t word, int half, BFloat16) {
  return bits_to_float(half == 0 ? word << 16 : word & 0xffff0000u);
}
__device__ inline float word_value(uint32_t word, int half, Float16) {
  return widen_half(half == 0 ? word & 0xffff : word >> 16);
}

}  // namespace opd::cuda
