// The functions on single rows that are compiled once per instruction set, by the rows' dtype.
#pragma once

#include <vector>

#include "background.h"
#include "linear.h"
#include "select.h"
#include "tail.h"

namespace opd::cpu {

struct RowKernels {
  SelectRow select;
  Widen widen;
  Dots dots;
  AddRows add_rows;
  Round round;
  SelectTail select_tail;
  TailSum tail;
  BackgroundRow background;
};

struct KernelsByDType {
  RowKernels float32;
  RowKernels float16;
  RowKernels bfloat16;

  const RowKernels& of(DType dtype) const {
    return dtype == DType::kFloat32 ? float32 : dtype == DType::kFloat16 ? float16 : bfloat16;
  }
};

extern const KernelsByDType kAvx512Kernels, kAvx2Kernels, kBaselineKernels;

struct InstructionSet {
  const char* name;
  bool supported;  // by the running CPU
  const KernelsByDType* kernels;
};

// The compiled instruction sets, best first. The last one runs anywhere.
const std::vector<InstructionSet>& instruction_sets();

}  // namespace opd::cpu
