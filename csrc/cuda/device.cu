// CUDA's versions and a device's shared memory, without making a context.

#include "launch.h"

namespace opd::cuda {

int driver_version() {
  int version = 0;
  cudaDriverGetVersion(&version);  // 0 where there is no driver
  return version;
}

int runtime_version() { return CUDART_VERSION; }

int shared_bytes(int index) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index),
        "tell a device's shared memory");
  return bytes;
}

}  // namespace opd::cuda
