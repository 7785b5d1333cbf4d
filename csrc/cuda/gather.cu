// Launches the gathering of values at ids.

#include "gather.cuh"

#include "launch.h"

namespace opd::cuda {

void gather(const GatherArgs& args, const Device& device) {
  const int64_t rows = args.ids.count;
  if (rows == 0 || args.ids.width == 0) return;
  const int of_block = rows_of_block(static_cast<int>(args.ids.width));
  launch(gather_kernel, Grid{(rows + of_block - 1) / of_block}, kGatherThreads, 0, 1, device, args,
         of_block);
}

}  // namespace opd::cuda
