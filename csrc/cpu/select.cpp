// Teacher top-K over rows: ids in selection order and their values.

#include "kernels.h"
#include "parallel.h"
#include "values.h"

namespace opd::cpu {

size_t select_scratch_bytes(int64_t limit, int k, int element_size) {
  constexpr int64_t kMostLanes = 32;  // of any instruction set; keys come in whole vectors
  const int64_t group = group_size(k);
  const int64_t groups = (limit + group - 1) / group;
  const size_t keys = static_cast<size_t>((groups > k * group ? groups : k * group) + kMostLanes);
  return round_up(k * sizeof(uint64_t), kScratchAlignment) +
         round_up(k * sizeof(int32_t), kScratchAlignment) + keys * element_size;
}

void select(const SelectArgs& args, const Processor& processor) {
  const int k = args.k;
  const SelectRow select_row = processor.kernels->of(args.logits.dtype).select;
  const size_t bytes =
      select_scratch_bytes(args.allowed.limit, k, element_size(args.logits.dtype));
  for_each_row(args.logits.count, args.allowed.limit, processor.threads, bytes,
               [&](int64_t row, void* scratch) {
                 int32_t* ids = args.ids + row * k;
                 float* values = args.values + row * k;
                 if (!args.allowed.row(row)) return fill_absent(ids, values, k);
                 const char* logits = args.logits.row(row);
                 select_row(logits, args.allowed.limit, args.allowed.banned, k, scratch, ids);
                 read_values(logits, args.logits.dtype, ids, k, values);
               });
}

}  // namespace opd::cpu
