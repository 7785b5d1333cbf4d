// The CPU primitives. A launcher takes one struct, the kernels of an instruction set and the number
// of threads; results do not depend on that number. Nothing here allocates tensors or knows Python.
#pragma once

#include "../common/arguments.h"
#include "instruction_sets.h"

namespace opd::cpu {

void select(const SelectArgs& args, const KernelsByDType& kernels, int threads);
void divergence(const DivergenceArgs& args, const KernelsByDType& kernels, int threads);
void scatter(const ScatterArgs& args, int threads);
void gather_dot(const GatherDotArgs& args, const KernelsByDType& kernels, int threads);
void gather_dot_hidden(const GatherDotHiddenArgs& args, const KernelsByDType& kernels, int threads);
void gather_dot_weight(const GatherDotWeightArgs& args, const KernelsByDType& kernels, int threads);

}  // namespace opd::cpu
