// A tensor seen as rows: any leading dimensions with any strides, elements of a row adjacent.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "formats.h"

namespace opd {

constexpr int kMaxLeading = 16;

struct Rows {
  char* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t count = 1;  // rows
  int64_t width = 0;  // elements of a row
  int dims = 0;       // leading dimensions after merging
  int64_t sizes[kMaxLeading] = {};
  int64_t strides[kMaxLeading] = {};  // in elements

  // Row numbers run over the leading dimensions in row-major order; offsets are 64-bit because
  // N * V passes 2^31 for ordinary batches.
  OPD_HD char* row(int64_t index) const {
    int64_t offset = 0;
    for (int d = dims - 1; d > 0; --d) {
      offset += (index % sizes[d]) * strides[d];
      index /= sizes[d];
    }
    if (dims > 0) offset += index * strides[0];
    return data + offset * element_size(dtype);
  }
};

// Merges leading dimensions that one stride can walk: most tensors then have one or two.
inline Rows make_rows(uintptr_t data, DType dtype, const std::vector<int64_t>& shape,
                      const std::vector<int64_t>& strides) {
  if (shape.empty() || shape.size() != strides.size())
    throw std::invalid_argument("rows need a shape of one dimension or more and as many strides");
  if (shape.back() > 1 && strides.back() != 1)
    throw std::invalid_argument("the elements of a row must be adjacent (last stride 1)");
  Rows rows;
  rows.data = reinterpret_cast<char*>(data);
  rows.dtype = dtype;
  rows.width = shape.back();
  for (size_t i = 0; i + 1 < shape.size(); ++i) {
    rows.count *= shape[i];
    if (shape[i] == 1) continue;
    const int last = rows.dims - 1;
    if (last >= 0 && rows.strides[last] == shape[i] * strides[i]) {
      rows.sizes[last] *= shape[i];
      rows.strides[last] = strides[i];
      continue;
    }
    if (rows.dims == kMaxLeading)
      throw std::invalid_argument("leading dimensions do not merge into " +
                                  std::to_string(kMaxLeading) + " or fewer; make the tensor contiguous");
    rows.sizes[rows.dims] = shape[i];
    rows.strides[rows.dims] = strides[i];
    ++rows.dims;
  }
  return rows;
}

}  // namespace opd
