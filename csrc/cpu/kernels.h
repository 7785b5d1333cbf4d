// The CPU primitives. A launcher takes one struct and the number of threads; rows are independent,
// so results do not depend on that number. Nothing here allocates tensors or knows Python.
#pragma once

#include "../common/arguments.h"
#include "select.h"

namespace opd::cpu {

void select(const SelectArgs& args, const RowSelectors& selectors, int threads);
void divergence(const DivergenceArgs& args, const RowSelectors& selectors, int threads);
void scatter(const ScatterArgs& args, int threads);

}  // namespace opd::cpu
