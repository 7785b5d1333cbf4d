// The log-sum-exp of what is outside of a support: of one that is selected in the same pass over
// the row, or given.

#include "tail.h"

#include "kernels.h"
#include "parallel.h"
#include "values.h"

namespace opd::cpu {

size_t tail_scratch_bytes(int64_t width, int k) {
  const size_t groups = (width + kTailBlock - 1) / kTailBlock * kTailLanes;
  return 2 * groups * sizeof(float) + k * sizeof(uint32_t);
}

void select_with_tail(const SelectWithTailArgs& args, const Processor& processor) {
  const SelectArgs& to = args.select;
  const int k = to.k;
  const DType dtype = to.logits.dtype;
  const SelectTail select_tail = processor.kernels->of(dtype).select_tail;
  const size_t select_bytes = round_up(
      select_scratch_bytes(to.allowed.limit, k, element_size(dtype)), kScratchAlignment);
  const size_t bytes = select_bytes + tail_scratch_bytes(args.width, k);
  for_each_row(to.logits.count, args.width, processor.threads, bytes,
               [&](int64_t row, void* scratch) {
                 int32_t* ids = to.ids + row * k;
                 float* values = to.values + row * k;
                 args.tail[row] = 0;
                 if (!to.allowed.row(row)) return fill_absent(ids, values, k);
                 const char* logits = to.logits.row(row);
                 args.tail[row] = select_tail(logits, to.allowed.limit, to.allowed.banned, k,
                                              scratch, ids, args.width, args.temperature.at(row),
                                              static_cast<char*>(scratch) + select_bytes);
                 read_values(logits, dtype, ids, k, values);
               });
}

void tail_logsumexp(const TailArgs& args, const Processor& processor) {
  const int k = static_cast<int>(args.ids.width);
  const TailSum tail = processor.kernels->of(args.logits.dtype).tail;
  const size_t ids_bytes = round_up(k * sizeof(int32_t), kScratchAlignment);
  const size_t bytes = ids_bytes + tail_scratch_bytes(args.width, k);
  for_each_row(args.logits.count, args.width, processor.threads, bytes,
               [&](int64_t row, void* scratch) {
                 args.tail[row] = 0;
                 if (args.mask && !args.mask[row]) return;
                 auto* ids = static_cast<int32_t*>(scratch);
                 const char* given = args.ids.row(row);
                 for (int i = 0; i < k; ++i) {
                   const int64_t id = id_at(given, args.ids.dtype, i);
                   ids[i] = id < 0 || id >= args.width ? -1 : static_cast<int32_t>(id);
                 }
                 args.tail[row] = tail(args.logits.row(row), args.width, args.temperature.at(row),
                                       ids, k, static_cast<char*>(scratch) + ids_bytes);
               });
}

}  // namespace opd::cpu
