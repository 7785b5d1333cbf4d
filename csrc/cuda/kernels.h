// The CUDA primitives. A launcher takes one struct, the device and a stream; it neither allocates
// nor synchronises, and throws what CUDA says of a launch.
#pragma once

#include <array>
#include <stdexcept>

#include "../common/arguments.h"

namespace opd::cuda {

constexpr int kMaxCluster = 8;  // blocks

// Where to launch, and what of it the shape of a launch depends on.
struct Device {
  int index;
  int multiprocessors;
  int shared_bytes;  // of a multiprocessor
  std::array<int, kMaxCluster - 1> clusters;  // of 2, 3, ... blocks that it holds at once
  void* stream;
};

void select(const SelectArgs& args, const Device& device);
void divergence(const DivergenceArgs& args, const Device& device);
void scatter(const ScatterArgs& args, const Device& device);

// The widest row of which the k best can be selected: the limits are those of shared memory.
int64_t max_width(int k, DType dtype);

// Of CUDA as the driver and the runtime in this module count it: 13000 is 13.0. The driver's is 0
// where there is none.
int driver_version();
int runtime_version();

// How many clusters of `size` blocks a device holds at once, of the largest blocks there are; 0
// where it has no clusters.
int max_clusters(int index, int size);

// Of a multiprocessor of a device.
int shared_bytes(int index);

}  // namespace opd::cuda
