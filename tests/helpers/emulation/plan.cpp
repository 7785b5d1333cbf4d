// Prints how a launch is cut: lane bits, threads and blocks for a row, bytes of shared memory,
// threads and bytes for a support that is given, the tiles that a warp loads at once, and the chunks
// that a thread does.

#include <cstdio>
#include <cstdlib>

#include "divergence.cuh"

using namespace opd;
using namespace opd::cuda;

int main(int count, char** words) {
  // Rows, width, k, bytes of an element; Device's members in order.
  if (count != 7 + kMaxCluster - 1) return 2;
  const auto number = [&](int i) { return std::atoi(words[i]); };
  Device device{0, number(5), number(6), {}, nullptr};
  for (int i = 0; i < kMaxCluster - 1; ++i) device.clusters[i] = number(7 + i);
  const DType dtype = number(4) == 4 ? DType::kFloat32 : DType::kBFloat16;
  const Plan plan = plan_selection(number(1), number(2), number(3), dtype, device);
  std::printf("%d %d %d %d %d %d %d %d\n", plan.lane_bits, plan.threads, plan.cluster,
              plan.shared_bytes, kEntryThreads, support_bytes(number(3)), kTilesAtOnce,
              Product::kChunksAtOnce);
}
