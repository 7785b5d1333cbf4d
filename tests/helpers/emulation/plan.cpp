// Prints how a launch is cut: lane bits, threads and blocks for a row, and bytes of shared memory, of
// a selection, of one with a tail and of one with its entropy; threads and bytes for a support that
// is given, the tiles that a warp loads at once without a tail and with one, and the chunks that a
// thread does.

#include <cstdio>
#include <cstdlib>

#include "divergence.cuh"
#include "tail.cuh"

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
  std::printf("%d %d %d %d ", plan.lane_bits, plan.threads, plan.cluster, plan.shared_bytes);
  double entropy;
  SelectWithTailArgs args{};
  args.select.logits.dtype = dtype;
  args.select.logits.count = number(1);
  args.select.allowed.limit = args.tail.width = number(2);
  args.select.k = number(3);
  for (double* place : {static_cast<double*>(nullptr), &entropy}) {
    args.tail.entropy = place;
    const TailPlan of_tail = plan_tail(args, number(3), device);
    const Plan& blocks = of_tail.selection;
    std::printf("%d %d %d %d ", of_tail.lane_bits, blocks.threads, blocks.cluster,
                blocks.shared_bytes);
  }
  using Sums = GroupSums<AlignedRow<Float32, Product>, false>;
  std::printf("%d %d %d %d %d\n", kEntryThreads, support_bytes(number(3)), kTilesAtOnce,
              Sums::kTilesAtOnce, Product::kChunksAtOnce);
}
