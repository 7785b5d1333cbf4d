// Reads a few elements of a row by id.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/values.h"

namespace opd::cpu {

// values[i] = row[ids[i]], -inf where the id is -1.
inline void read_values(const char* row, DType dtype, const int32_t* ids, int k, float* values) {
  for (int i = 0; i < k; ++i) values[i] = ids[i] < 0 ? -INFINITY : value_at(row, dtype, ids[i]);
}

inline void prefetch(const char* row, DType dtype, const int32_t* ids, int k) {
  const int64_t size = element_size(dtype);
  for (int i = 0; i < k; ++i)
    if (ids[i] >= 0) __builtin_prefetch(row + ids[i] * size);
}

inline void fill_absent(int32_t* ids, float* values, int k) {
  for (int i = 0; i < k; ++i) {
    ids[i] = -1;
    values[i] = -INFINITY;
  }
}

}  // namespace opd::cpu
