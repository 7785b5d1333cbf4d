// Launching a kernel: by the CUDA runtime, or by the emulation that stands in for it.
#pragma once

#include "kernels.h"

#if defined(OPD_EMULATION)
#include "emulation.h"
#else

#include <cuda_runtime.h>

#include <string>

namespace opd::cuda {

inline void check(cudaError_t error, const char* action) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, so that nobody else finds it
  throw std::runtime_error(std::string("CUDA cannot ") + action + ": " + cudaGetErrorName(error) +
                           ", " + cudaGetErrorString(error));
}

// RAII guard: sets the current device and restores it on destruction.
class OnDevice {
 public:
  explicit OnDevice(int index) {
    check(cudaGetDevice(&before_), "tell the current device");
    if (index != before_) check(cudaSetDevice(index), "use the device");
    changed_ = index != before_;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline cudaLaunchAttribute cluster_attribute(int size) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(size);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  return attribute;
}

struct Grid {
  int64_t x;
  int64_t y = 1;
};

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Grid& grid, int threads, int shared_bytes,
            int cluster, const Device& device, const Parameters&... arguments) {
  constexpr int kSharedWithoutAsking = 48 * 1024;
  if (grid.x > 0x7fffffff || grid.y > 0xffff)
    throw std::invalid_argument("CUDA launches at most 2^31 - 1 rows, of 4 GB each, at once");
  const OnDevice on_device(device.index);
  if (shared_bytes > kSharedWithoutAsking)  // always the same value: other threads may launch, too
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared),
          "give a block its shared memory");
  cudaLaunchAttribute in_clusters = cluster_attribute(cluster);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(device.stream);
  config.attrs = &in_clusters;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch a kernel");
}

// How many clusters of `size` blocks the device holds at once; 0 where CUDA refuses to say.
template <class... Parameters>
int resident_clusters(void (*kernel)(Parameters...), int index, int threads, int size) {
  const OnDevice on_device(index);
  cudaLaunchAttribute in_clusters = cluster_attribute(size);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(size));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.attrs = &in_clusters;
  config.numAttrs = 1;
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) == cudaSuccess) return count;
  cudaGetLastError();  // clears the error, so that nobody else finds it
  return 0;
}

}  // namespace opd::cuda

#endif
