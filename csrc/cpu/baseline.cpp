#include "row_kernels.h"

namespace opd::cpu {

const KernelsByDType kBaselineKernels = kKernels;

}  // namespace opd::cpu
