// The number formats that logits and gradients come in: bit layout, widening, rounding. Host and
// device code share this file; OPD_HD is __host__ __device__ under nvcc and nothing elsewhere.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define OPD_HD __host__ __device__
#else
#define OPD_HD
#endif

namespace opd {

enum class DType : int { kFloat32, kFloat16, kBFloat16, kInt32, kInt64 };

OPD_HD inline int element_size(DType dtype) {
  switch (dtype) {
    case DType::kInt64: return 8;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    default: return 2;
  }
}

OPD_HD inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

OPD_HD inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// A format names the signed integer that holds its bits, and the bits of +infinity: ordering needs
// no more. It converts to and from float, rounding to nearest, ties to even.
struct Float32 {
  using Bits = int32_t;
  static constexpr Bits kInfinity = 0x7f800000;
  OPD_HD static float widen(Bits bits) { return bits_to_float(static_cast<uint32_t>(bits)); }
  OPD_HD static Bits round(float value) { return static_cast<Bits>(float_to_bits(value)); }
};

struct BFloat16 {
  using Bits = int16_t;
  static constexpr Bits kInfinity = 0x7f80;
  OPD_HD static float widen(Bits bits) {
    return bits_to_float(static_cast<uint32_t>(static_cast<uint16_t>(bits)) << 16);
  }
  OPD_HD static Bits round(float value) {
    const uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<Bits>((bits >> 16) | 0x40u);
    return static_cast<Bits>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

struct Float16 {
  using Bits = int16_t;
  static constexpr Bits kInfinity = 0x7c00;
  OPD_HD static float widen(Bits bits) {
    const uint32_t half = static_cast<uint16_t>(bits);
    const uint32_t sign = (half & 0x8000u) << 16;
    const uint32_t magnitude = (half & 0x7fffu) << 13;
    if (magnitude >= 0x0f800000u) return bits_to_float(sign | magnitude | 0x7f800000u);
    // Multiplying by 2^112 moves the exponent's bias and normalises subnormals exactly.
    const float scaled = bits_to_float(magnitude) * bits_to_float(0x77800000u);
    return bits_to_float(sign | float_to_bits(scaled));
  }
  OPD_HD static Bits round(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
      half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
      half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
      half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
    } else {
      half = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    return static_cast<Bits>(sign | half);
  }
};

}  // namespace opd
