// Reading a few elements of a row whose dtype is known only at run time.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/formats.h"

namespace opd::cpu {

inline float value_at(const char* row, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat32: return Float32::widen(reinterpret_cast<const int32_t*>(row)[index]);
    case DType::kFloat16: return Float16::widen(reinterpret_cast<const int16_t*>(row)[index]);
    default: return BFloat16::widen(reinterpret_cast<const int16_t*>(row)[index]);
  }
}

inline int64_t id_at(const char* row, DType dtype, int64_t index) {
  return dtype == DType::kInt64 ? reinterpret_cast<const int64_t*>(row)[index]
                                : reinterpret_cast<const int32_t*>(row)[index];
}

// values[i] = row[ids[i]], -inf where the id is -1.
inline void gather(const char* row, DType dtype, const int32_t* ids, int k, float* values) {
  for (int i = 0; i < k; ++i)
    values[i] = ids[i] < 0 ? -INFINITY : value_at(row, dtype, ids[i]);
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
