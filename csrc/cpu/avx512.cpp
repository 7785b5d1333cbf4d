#include "row_kernels.h"

namespace opd::cpu {

const KernelsByDType kAvx512Kernels = kKernels;

}  // namespace opd::cpu
