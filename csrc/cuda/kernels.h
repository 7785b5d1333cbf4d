// The CUDA primitives. A launcher takes one struct and the device with its stream. It neither
// allocates nor synchronises, and it throws CUDA's error if a launch fails.
#pragma once

#include <array>
#include <stdexcept>

#include "../common/arguments.h"

namespace opd::cuda {

constexpr int kMaxCluster = 8;  // blocks
// Shared memory that every architecture has for one block.
constexpr int kMostShared = 99 * 1024;

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
// The support is selected from the teacher's logits; the divergence is reverse_kl(),
void select_divergence(const DivergenceArgs& args, const Device& device);
// or given; the divergence is any,
void entry_divergence(const DivergenceArgs& args, const Device& device);
// other than reverse_kl().
void member_divergence(const DivergenceArgs& args, const Device& device);
// Both tails are given.
void full_divergence(const FullDivergenceArgs& args, const Device& device);
void scatter(const ScatterArgs& args, const Device& device);
void scatter_background(const BackgroundArgs& args, const Device& device);
void select_with_tail(const SelectWithTailArgs& args, const Device& device);
void tail_logsumexp(const TailArgs& args, const Device& device);

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
