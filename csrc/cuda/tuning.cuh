// What could be otherwise without changing a result. benchmarks/gpu/variants.cu compiles the kernels
// with other choices than the product's, for a GPU to compare.
#pragma once

#include "device.cuh"

namespace opd::cuda {

struct Product {
  // Chunks of the groups that are read again that a thread loads at once.
  static constexpr int kChunksAtOnce = 4;
  // A row is read once, and its groups soon after or never: no cache need keep it.
  __device__ static uint4 load(const uint4* address) { return __ldcs(address); }
  // Zeros of the gradient, of which a few become entries next.
  __device__ static void store(uint4* address, const uint4& value) { *address = value; }
};

}  // namespace opd::cuda
