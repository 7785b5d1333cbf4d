// Reading elements of a row whose dtype is known only at run time.
#pragma once

#include <cstdint>

#include "formats.h"

namespace opd {

OPD_HD inline float value_at(const char* row, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat32: return Float32::widen(reinterpret_cast<const int32_t*>(row)[index]);
    case DType::kFloat16: return Float16::widen(reinterpret_cast<const int16_t*>(row)[index]);
    default: return BFloat16::widen(reinterpret_cast<const int16_t*>(row)[index]);
  }
}

OPD_HD inline int64_t id_at(const char* row, DType dtype, int64_t index) {
  return dtype == DType::kInt64 ? reinterpret_cast<const int64_t*>(row)[index]
                                : reinterpret_cast<const int32_t*>(row)[index];
}

}  // namespace opd
