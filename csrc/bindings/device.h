// The further argument of modules with CUDA kernels: the device and its stream.
#pragma once

#include "../cuda/kernels.h"
#include "arguments.h"

namespace opd {

inline void define_device(py::module_& m) {
  py::class_<cuda::Device>(m, "Device", py::module_local(),
                           "(index, multiprocessors, shared_bytes, clusters, stream)")
      .def(py::init([](int index, int multiprocessors, int shared_bytes,
                       const std::array<int, cuda::kMaxCluster - 1>& clusters, uintptr_t stream) {
        return cuda::Device{index, multiprocessors, shared_bytes, clusters, pointer<void>(stream)};
      }));
}

}  // namespace opd
