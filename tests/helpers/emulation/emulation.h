// CUDA C++ on a CPU: what the kernels use of the language, for g++, and a launch that runs them.
//
// Every thread of a block is a fiber with a stack of its own; a fiber runs until it waits for
// others, at a barrier or in an exchange between the lanes of a warp. Which one runs next is the
// schedule: OPD_EMULATION_SCHEDULE is 0 (lowest thread first, so each runs as far as it can), 1
// (highest first) or the seed of a random order. A barrier that is missing lets some schedule read
// what is not yet written. OPD_EMULATION_WITHOUT, "select.cuh:123", makes the barrier of that line
// do nothing.
//
// Shared memory is as large as asked for, a heap block of its own (for AddressSanitizer), and
// filled with a pattern, which depends on the schedule. A launch fails where threads wait for each
// other in vain or in different places.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>

#include "../../../csrc/common/formats.h"

#define __host__
#define __device__
#define __global__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulation {

struct Index {
  unsigned x, y;
};

// What a thread sees of itself.
struct Thread {
  Index thread, block;
  int cluster_rank;
};

// Of the launch that runs.
struct Shape {
  Index block, grid;
  int cluster;
};

extern Thread* current;
extern Shape shape;

// Waits until all threads of the block, of the cluster, or lanes of the warp are at this line.
void barrier_of_block(const char* file, int line);
void barrier_of_cluster(const char* file, int line);
// The two halves of a cluster's barrier. This arrive orders no memory.
void arrive_at_cluster(const char* file, int line);
void wait_for_cluster(const char* file, int line);
void barrier_of_warp(const char* file, int line);

// Every lane's value, once all lanes of the warp are at this line; valid until the next exchange.
const uint32_t* exchange(uint32_t value, const char* file, int line);

char* shared_memory();
char* in_leader(char* at);

template <class T>
T* in_leader(T* at) {
  return reinterpret_cast<T*>(in_leader(reinterpret_cast<char*>(at)));
}

inline int cluster_rank() { return current->cluster_rank; }
inline int cluster_size() { return shape.cluster; }
inline int lane() { return static_cast<int>(current->thread.x % 32); }

// Runs body() for every thread; throws what went wrong.
void run(Index grid, int threads, int shared_bytes, int cluster, const std::function<void()>& body);

template <class Format>
uint32_t value_max(uint32_t a, uint32_t b) {
  using Bits = typename Format::Bits;
  const float x = Format::widen(static_cast<Bits>(a)), y = Format::widen(static_cast<Bits>(b));
  if (std::isnan(x) || std::isnan(y)) return 0x7fffffffu >> (32 - 8 * sizeof(Bits));
  return x > y || (x == y && !std::signbit(x)) ? a : b;
}

template <class Format>
uint32_t word_max(uint32_t a, uint32_t b) {
  if constexpr (sizeof(typename Format::Bits) == 4) return value_max<Format>(a, b);
  return value_max<Format>(a & 0xffff, b & 0xffff) | value_max<Format>(a >> 16, b >> 16) << 16;
}

// Every NaN of 16 bits is the same.
template <class Format>
uint32_t round_word(const float* values) {
  if constexpr (sizeof(typename Format::Bits) == 4) return opd::float_to_bits(*values);
  const auto half = [](float value) {
    return std::isnan(value) ? 0x7fffu : static_cast<uint16_t>(Format::round(value));
  };
  return half(values[0]) | half(values[1]) << 16;
}

inline uint32_t byte_perm(uint32_t a, uint32_t b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return out;
}

template <class T>
T shuffled(T value, int from, const char* file, int line) {
  static_assert(sizeof(T) == 4, "shuffles move 32 bits");
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t* all = exchange(bits, file, line);
  memcpy(&value, &all[from < 0 || from > 31 ? lane() : from], sizeof value);
  return value;
}

template <class T, class Combine>
T reduced(T value, Combine combine, const char* file, int line) {
  const uint32_t* all = exchange(static_cast<uint32_t>(value), file, line);
  T result = static_cast<T>(all[0]);
  for (int i = 1; i < 32; ++i) result = combine(result, static_cast<T>(all[i]));
  return result;
}

// ex2.approx.ftz.f32, but for its last bits.
inline float power_of_2(float x) {
  const float power = std::exp2(x);
  return power < 0x1p-126f ? 0 : power;
}

inline float widen_half(uint32_t bits) {
  return opd::Float16::widen(static_cast<opd::Float16::Bits>(bits));
}

// Counts what a kernel reads of rows, 16 bytes at a time.
void count_load();

inline uint4 streamed(const uint4* address) {
  count_load();
  return *address;
}

// Reads what a GPU would bring into its cache: no address outside is asked for.
inline void prefetch(const void* address) { (void)*static_cast<const volatile char*>(address); }

inline int fetch_add(int* address, int value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

}  // namespace emulation

#define OPD_HERE __FILE__, __LINE__
#define threadIdx (::emulation::current->thread)
#define blockIdx (::emulation::current->block)
#define blockDim (::emulation::shape.block)
#define gridDim (::emulation::shape.grid)
#define __syncthreads() ::emulation::barrier_of_block(OPD_HERE)
#define __syncwarp() ::emulation::barrier_of_warp(OPD_HERE)
#define cluster_barrier() ::emulation::barrier_of_cluster(OPD_HERE)
#define cluster_arrive() ::emulation::arrive_at_cluster(OPD_HERE)
#define cluster_wait() ::emulation::wait_for_cluster(OPD_HERE)
#define __shfl_sync(mask, value, from) ::emulation::shuffled(value, from, OPD_HERE)
#define __shfl_xor_sync(mask, value, other) \
  ::emulation::shuffled(value, ::emulation::lane() ^ (other), OPD_HERE)
#define __shfl_up_sync(mask, value, distance) \
  ::emulation::shuffled(value, ::emulation::lane() - (distance), OPD_HERE)
#define __reduce_add_sync(mask, value) \
  ::emulation::reduced(value, [](auto a, auto b) { return a + b; }, OPD_HERE)
#define __reduce_min_sync(mask, value) \
  ::emulation::reduced(value, [](auto a, auto b) { return std::min(a, b); }, OPD_HERE)
#define __reduce_max_sync(mask, value) \
  ::emulation::reduced(value, [](auto a, auto b) { return std::max(a, b); }, OPD_HERE)
#define __any_sync(mask, value) \
  ::emulation::reduced(static_cast<int>(value), [](int a, int b) { return a | b; }, OPD_HERE)
#define __ballot_sync(mask, value)                                         \
  ::emulation::reduced(static_cast<unsigned>((value) ? 1 : 0) << ::emulation::lane(), \
                       [](unsigned a, unsigned b) { return a | b; }, OPD_HERE)
#define atomicAdd(address, value) ::emulation::fetch_add(address, value)
#define __popc(value) __builtin_popcount(value)
#define __ffs(value) __builtin_ffs(static_cast<int>(value))
#define __byte_perm(a, b, selector) ::emulation::byte_perm(a, b, selector)
#define __ldcs(address) ::emulation::streamed(address)

// What the runtime's headers have.
#define CUDART_VERSION 0
inline int cudaDriverGetVersion(int* version) { return *version = 0; }
constexpr int cudaDevAttrMaxSharedMemoryPerMultiprocessor = 0;
inline int cudaDeviceGetAttribute(int* value, int, int) {
  *value = 228 * 1024;
  return 0;
}
inline void check(int, const char*) {}

namespace opd::cuda {

using std::isnan;
using std::max;
using std::min;

struct Device;
struct Grid {
  int64_t x;
  int64_t y = 1;
};

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Grid& grid, int threads, int shared_bytes,
            int cluster, const Device&, const Parameters&... arguments) {
  emulation::run({static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y)}, threads,
                 shared_bytes, cluster, [&] { kernel(arguments...); });
}

// Those of an H100, where clusters of this size find room.
template <class... Parameters>
int resident_clusters(void (*)(Parameters...), int, int, int size) {
  constexpr int kOfH100[] = {66, 42, 32, 24, 18, 16, 16};
  return kOfH100[size - 2];
}

}  // namespace opd::cuda
