// Compiler vectors as wide as the including file's flags allow, and the few operations on them that
// the kernels need. Only the headers of row kernels include this: everything here is compiled once
// per instruction set and must stay in an unnamed namespace.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512BW__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2, NEON
#endif

template <class Bits>
struct VectorOf {
  typedef Bits type __attribute__((vector_size(kVectorBytes)));
};
template <class Bits>
using Vector = typename VectorOf<Bits>::type;

template <class Bits>
constexpr int kLanes = kVectorBytes / sizeof(Bits);

template <class Bits>
inline Vector<Bits> load(const Bits* from) {
  Vector<Bits> v;
  memcpy(&v, from, kVectorBytes);
  return v;
}

template <class Bits>
inline void store(Bits* to, Vector<Bits> v) {
  memcpy(to, &v, kVectorBytes);
}

template <class Bits>
inline Vector<Bits> broadcast(Bits value) {
  return Vector<Bits>{} + value;
}

template <class Bits>
inline Vector<Bits> lanewise_max(Vector<Bits> a, Vector<Bits> b) {
  return a > b ? a : b;
}

template <class Bits>
inline Vector<Bits> lanewise_min(Vector<Bits> a, Vector<Bits> b) {
  return a < b ? a : b;
}

// Takes maxima of pairs of lanes whose numbers differ in the bit `Step`. Lanes with the bit clear
// get the maximum of a's pair, lanes with the bit set get that of b's. Applied as a tree over 2^n
// vectors, it reduces each of them.
template <int Step, class Bits, size_t... Lane>
inline Vector<Bits> fold(Vector<Bits> a, Vector<Bits> b, std::index_sequence<Lane...>) {
  constexpr int kB = kLanes<Bits>;
  const Vector<Bits> kept =
      __builtin_shufflevector(a, b, (static_cast<int>(Lane) + (Lane & Step ? kB : 0))...);
  const Vector<Bits> moved = __builtin_shufflevector(
      a, b, ((static_cast<int>(Lane) ^ Step) + (Lane & Step ? kB : 0))...);
  return lanewise_max<Bits>(kept, moved);
}

// Reorders runs of Run lanes: the first lanes of all runs, then their second lanes, and so on.
template <int Run, class Bits, size_t... Lane>
inline Vector<Bits> interleave_runs(Vector<Bits> v, std::index_sequence<Lane...>) {
  constexpr size_t kCount = kLanes<Bits> / Run;
  return __builtin_shufflevector(v, v, (static_cast<int>(Lane % kCount * Run + Lane / kCount))...);
}

// One bit per lane from a comparison's all-ones or all-zeros lanes.
inline uint64_t lane_bits(Vector<int16_t> mask) {
#if defined(__AVX512BW__)
  return _mm512_movepi16_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  const __m256i bytes =
      _mm256_packs_epi16(reinterpret_cast<__m256i>(mask), _mm256_setzero_si256());
  const uint32_t bits = static_cast<uint32_t>(_mm256_movemask_epi8(bytes));  // 8 of each half
  return (bits & 0xffu) | (bits >> 8 & 0xff00u);
#elif defined(__SSE2__)
  const __m128i bytes = _mm_packs_epi16(reinterpret_cast<__m128i>(mask), _mm_setzero_si128());
  return static_cast<uint32_t>(_mm_movemask_epi8(bytes));
#else
  uint64_t bits = 0;
  for (int lane = 0; lane < kLanes<int16_t>; ++lane) bits |= uint64_t(mask[lane] & 1) << lane;
  return bits;
#endif
}

inline uint64_t lane_bits(Vector<int32_t> mask) {
#if defined(__AVX512BW__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask));
#elif defined(__SSE2__)
  return _mm_movemask_ps(reinterpret_cast<__m128>(mask));
#else
  uint64_t bits = 0;
  for (int lane = 0; lane < kLanes<int32_t>; ++lane) bits |= uint64_t(mask[lane] & 1) << lane;
  return bits;
#endif
}

// The inverse of lane_bits: all ones in the lanes whose bit is set.
template <class Bits>
inline Vector<Bits> lanes_of(uint64_t bits) {
  Vector<Bits> spread, lane_bit;
  for (int lane = 0; lane < kLanes<Bits>; ++lane) {
    spread[lane] = static_cast<Bits>(bits >> (lane & ~15));
    lane_bit[lane] = static_cast<Bits>(1u << (lane & 15));
  }
  return (spread & lane_bit) != Vector<Bits>{};
}

}  // namespace
