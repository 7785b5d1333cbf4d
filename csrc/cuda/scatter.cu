// Launches the dense gradient's kernel.

#include "scatter.cuh"

#include "launch.h"

namespace opd::cuda {

void scatter(const ScatterArgs& args, const Device& device) {
  constexpr int kThreads = 128;
  constexpr int64_t kPieceBytes = 64 * 1024;  // of a row that one block clears
  const int64_t rows = args.out.count, width = args.out.width;
  if (rows == 0 || width == 0) return;
  const DType dtype = args.out.dtype;
  // A row may begin inside its first 16 bytes.
  const int64_t size = element_size(dtype), elements = width + 16 / size - 1;
  const int64_t piece = args.mode == ScatterMode::kClear ? kPieceBytes / size : elements;
  const auto kernel = dtype == DType::kFloat32   ? scatter_kernel<Float32>
                      : dtype == DType::kFloat16 ? scatter_kernel<Float16>
                                                 : scatter_kernel<BFloat16>;
  launch(kernel, Grid{rows, (elements + piece - 1) / piece}, kThreads, 0, 1, device, args, piece);
}

}  // namespace opd::cuda
