// Choices that change no result. benchmarks/gpu/variants.cu compiles the kernels with other choices
// than the product's, to compare them on a GPU.
#pragma once

#include "device.cuh"

namespace opd::cuda {

struct Product {
  // Chunks that a thread loads at once when groups are read again.
  static constexpr int kChunksAtOnce = 4;
  // A row is read once, and a few groups again soon after: no cache has to keep it.
  __device__ static uint4 load(const uint4* address) { return __ldcs(address); }
  // Zeros of the gradient. A few of them are overwritten by entries next.
  __device__ static void store(uint4* address, const uint4& value) { *address = value; }
};

}  // namespace opd::cuda
