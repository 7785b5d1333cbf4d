#include "row_kernels.h"

namespace opd::cpu {

const KernelsByDType kAvx2Kernels = kKernels;

}  // namespace opd::cpu
