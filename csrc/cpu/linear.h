// Work on rows of hidden states and of a head's weight; compiled once per instruction set.
//
// Buffers of floats are padded to whole blocks of kBlock elements. Each product and each sum is
// rounded. A dot product is the sum of kBlock partial sums, one for each position in a block. So
// all instruction sets give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace opd::cpu {

constexpr int kBlock = 16;

constexpr int64_t padded(int64_t width) { return (width + kBlock - 1) / kBlock * kBlock; }

// Converts a row to floats, with zeros up to the padding.
using Widen = void (*)(const void* row, int64_t width, float* to);

// out[i] = vector . row i, of a padded vector.
using Dots = void (*)(const float* vector, const void* const* rows, int count, int64_t width,
                      float* out);

// sum += factor i * row i, one row after the other.
using AddRows = void (*)(const float* factors, const void* const* rows, int64_t count,
                         int64_t width, float* sum);

// Rounds floats to the format.
using Round = void (*)(const float* from, int64_t width, void* row);

}  // namespace opd::cpu
