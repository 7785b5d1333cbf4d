// The CUDA primitives. A launcher takes one struct and the device with its stream. It neither
// allocates nor synchronises, and it throws CUDA's error if a launch fails.
#pragma once

#include <array>
#include <stdexcept>

#include "../common/arguments.h"

namespace opd::cuda {

constexpr int kMaxCluster = 8;  // blocks

// The device to launch on, and the properties that a launch depends on.
struct Device {
  int index;
  int multiprocessors;
  int shared_bytes;  // of a multiprocessor
  std::array<int, kMaxCluster - 1> clusters;  // of 2, 3, ... blocks that it holds at once
  void* stream;
};

void select(const SelectArgs& args, const Device& device);
void gather(const GatherArgs& args, const Device& device);
// The support is selected from the teacher's logits,
void select_divergence(const DivergenceArgs& args, const Device& device);
// or given.
void entry_divergence(const DivergenceArgs& args, const Device& device);
void scatter(const ScatterArgs& args, const Device& device);

// The widest row from which k can be selected. Shared memory limits it.
int64_t max_width(int k, DType dtype);

// CUDA's versions, 13000 for 13.0: of the driver, 0 if there is none, and of this module's runtime.
int driver_version();
int runtime_version();

// How many clusters of `size` blocks of the largest size a device holds at once; 0 if it has no
// clusters.
int max_clusters(int index, int size);

// Bytes of shared memory of one multiprocessor of a device.
int shared_bytes(int index);

}  // namespace opd::cuda
