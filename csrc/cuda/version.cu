// Which CUDA there is, without touching a device.

#include "launch.h"

namespace opd::cuda {

int driver_version() {
  int version = 0;
  cudaDriverGetVersion(&version);  // 0 where there is no driver
  return version;
}

int runtime_version() { return CUDART_VERSION; }

}  // namespace opd::cuda
