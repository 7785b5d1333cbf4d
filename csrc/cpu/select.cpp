// Teacher top-K over rows: ids in selection order and their values.

#include "kernels.h"
#include "parallel.h"
#include "values.h"

namespace opd::cpu {

size_t select_scratch_bytes(int64_t limit, int k, int element_size) {
  constexpr int64_t kVectorBytes = 64;
  const int64_t group = group_size(k);
  const int64_t groups = (limit + group - 1) / group;
  const int64_t keys = groups > k * group ? groups : k * group;
  const int64_t lists = (k * int64_t(sizeof(uint64_t)) + kVectorBytes) +
                        (k * int64_t(sizeof(int32_t)) + kVectorBytes);
  return static_cast<size_t>(lists + keys * element_size + 2 * kVectorBytes);
}

void select(const SelectArgs& args, const RowSelectors& selectors, int threads) {
  const int k = args.k;
  const SelectRow select_row = selectors.of(args.logits.dtype);
  const size_t bytes =
      select_scratch_bytes(args.allowed.limit, k, element_size(args.logits.dtype));
  for_each_row(args.logits.count, args.allowed.limit, threads, bytes,
               [&](int64_t row, void* scratch) {
                 int32_t* ids = args.ids + row * k;
                 float* values = args.values + row * k;
                 if (!args.allowed.row(row)) return fill_absent(ids, values, k);
                 const char* logits = args.logits.row(row);
                 select_row(logits, args.allowed.limit, args.allowed.banned, k, scratch, ids);
                 gather(logits, args.logits.dtype, ids, k, values);
               });
}

}  // namespace opd::cpu
