// Which compiled variants exist and which of them the running CPU can execute. This file is apart
// from the variants, because theirs may hold instructions that this CPU does not have.

#include "instruction_sets.h"

namespace opd::cpu {

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = {
#if defined(OPD_X86_VARIANTS)
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("bmi2"),
       &kAvx512Kernels},
      {"avx2",
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi2"),
       &kAvx2Kernels},
#endif
      {"baseline", true, &kBaselineKernels}};
  return sets;
}

}  // namespace opd::cpu
