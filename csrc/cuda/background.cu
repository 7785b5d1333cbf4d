// Launches the dense gradient with a background.

#include "background.cuh"

#include "launch.h"

namespace opd::cuda {

void scatter_background(const BackgroundArgs& args, const Device& device) {
  constexpr int64_t kPieceBytes = 64 * 1024;  // of a row that one block writes
  const ScatterArgs& to = args.scatter;
  const int64_t rows = to.out.count, width = to.out.width;
  if (rows == 0 || width == 0) return;
  const DType dtype = to.out.dtype;
  // A row may begin inside its first 16 bytes.
  const int64_t size = element_size(dtype), elements = width + 16 / size - 1;
  const int64_t piece = kPieceBytes / size;
  const auto kernel = dtype == DType::kFloat32   ? background_kernel<Float32>
                      : dtype == DType::kFloat16 ? background_kernel<Float16>
                                                 : background_kernel<BFloat16>;
  launch(kernel, Grid{rows, (elements + piece - 1) / piece}, kBackgroundThreads, 0, 1, device, args,
         piece);
}

}  // namespace opd::cuda
