// The CPU primitives. A launcher takes one struct, and what to run on; results do not depend on the
// number of threads. Nothing here allocates tensors or knows Python.
#pragma once

#include "../common/arguments.h"
#include "instruction_sets.h"

namespace opd::cpu {

// What a launch runs on: the kernels of an instruction set, and a number of threads.
struct Processor {
  const KernelsByDType* kernels;
  int threads;
};

void select(const SelectArgs& args, const Processor& processor);
void gather(const GatherArgs& args, const Processor& processor);
// The support is selected from the teacher's logits,
void select_divergence(const DivergenceArgs& args, const Processor& processor);
// or given.
void entry_divergence(const DivergenceArgs& args, const Processor& processor);
void select_with_tail(const SelectWithTailArgs& args, const Processor& processor);
void tail_logsumexp(const TailArgs& args, const Processor& processor);
void full_divergence(const FullDivergenceArgs& args, const Processor& processor);
void scatter(const ScatterArgs& args, const Processor& processor);
void scatter_background(const BackgroundArgs& args, const Processor& processor);
void gather_dot(const GatherDotArgs& args, const Processor& processor);
void gather_dot_hidden(const GatherDotHiddenArgs& args, const Processor& processor);
void gather_dot_weight(const GatherDotWeightArgs& args, const Processor& processor);

}  // namespace opd::cpu
