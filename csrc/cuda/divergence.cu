// Launches the divergence, on a support that is selected or given.

#include "divergence.cuh"

#include "launch.h"

namespace opd::cuda {

void select_divergence(const DivergenceArgs& args, const Device& device) {
  const int64_t rows = args.student.count;
  if (rows == 0) return;
  const DType dtype = args.teacher.dtype;
  const Plan plan = plan_selection(rows, args.allowed.limit, args.k, dtype, device);
  const auto kernel = dtype == DType::kFloat32   ? divergence_kernel<Float32>
                      : dtype == DType::kFloat16 ? divergence_kernel<Float16>
                                                 : divergence_kernel<BFloat16>;
  launch(kernel, Grid{rows * plan.cluster}, plan.threads, plan.shared_bytes, plan.cluster, device,
         args, plan);
}

void entry_divergence(const DivergenceArgs& args, const Device& device) {
  const int64_t rows = args.student.count;
  if (rows == 0) return;
  if (!args.objective.is_reverse_kl()) return member_divergence(args, device);
  launch(support_divergence_kernel, Grid{rows}, kEntryThreads, support_bytes(args.k), 1, device,
         args);
}

}  // namespace opd::cuda
