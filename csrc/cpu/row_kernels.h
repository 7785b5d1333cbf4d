// The function table of an instruction set. Each including file compiles it with its own flags.
#pragma once

#include "background_row.h"
#include "instruction_sets.h"
#include "linear_row.h"
#include "select_row.h"
#include "tail_row.h"

namespace {

template <class Format>
constexpr RowKernels kRowKernels = {select_row<Format>, widen<Format>, dots<Format>,
                                    add_rows<Format>, round_row<Format>, select_tail<Format>,
                                    tail_sum<Format>, background_row<Format>};

constexpr KernelsByDType kKernels = {kRowKernels<Float32>, kRowKernels<Float16>,
                                     kRowKernels<BFloat16>};

}  // namespace
