// Launches the selection.

#include "select.cuh"

#include "launch.h"

namespace opd::cuda {

void select(const SelectArgs& args, const Device& device) {
  const int64_t rows = args.logits.count;
  if (rows == 0) return;
  const DType dtype = args.logits.dtype;
  const Plan plan = plan_selection(rows, args.allowed.limit, args.k, dtype, device);
  const auto kernel = dtype == DType::kFloat32   ? select_kernel<Float32>
                      : dtype == DType::kFloat16 ? select_kernel<Float16>
                                                 : select_kernel<BFloat16>;
  launch(kernel, Grid{rows * plan.cluster}, plan.threads, plan.shared_bytes, plan.cluster, device,
         args, plan);
}

int max_clusters(int index, int size) {
  return resident_clusters(select_kernel<Float32>, index, kMaxThreads, size);
}

int64_t max_width(int k, DType dtype) {
  int64_t fits = k, too_wide = int64_t{1} << 30;
  while (too_wide - fits > 1) {
    const int64_t middle = (fits + too_wide) / 2;
    (lane_bits(middle, k, element_size(dtype)) < 0 ? too_wide : fits) = middle;
  }
  return fits;
}

}  // namespace opd::cuda
