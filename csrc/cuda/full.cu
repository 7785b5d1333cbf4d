// Launches the divergences of the whole family, on a support that is given.

#include "full.cuh"

#include "launch.h"

namespace opd::cuda {

void member_divergence(const DivergenceArgs& args, const Device& device) {
  launch(support_member_kernel, Grid{args.student.count}, kEntryThreads,
         support_bytes(args.k) + RowTeam::kOnceBytes, 1, device, args);
}

void full_divergence(const FullDivergenceArgs& args, const Device& device) {
  const int64_t rows = args.student.count;
  if (rows == 0) return;
  if (!args.student_tail) throw std::invalid_argument("the student's tail is not given");
  launch(full_divergence_kernel, Grid{rows}, kEntryThreads,
         FullRow::bytes(static_cast<int>(args.ids.width)), 1, device, args);
}

}  // namespace opd::cuda
