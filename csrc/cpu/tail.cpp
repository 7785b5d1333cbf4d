// The log-sum-exp of what is outside of a support: of one that is selected in the same pass over
// the row, or given.

#include "tail.h"

#include "kernels.h"
#include "parallel.h"
#include "values.h"

namespace opd::cpu {

size_t tail_scratch_bytes(int64_t width, int k) {
  const size_t groups = (width + kTailBlock - 1) / kTailBlock * kTailLanes;
  return 3 * groups * sizeof(float) + k * sizeof(uint32_t);
}

namespace {

// The ids that a tail leaves out, as 32-bit numbers; -1 for those outside of its width.
void read_ids(const Rows& from, int64_t row, int64_t width, int32_t* ids) {
  const char* given = from.row(row);
  for (int64_t i = 0; i < from.width; ++i) {
    const int64_t id = id_at(given, from.dtype, static_cast<int>(i));
    ids[i] = id < 0 || id >= width ? -1 : static_cast<int32_t>(id);
  }
}

void write(const Tail& tail, int64_t row, const TailSums& sums) {
  tail.logsumexp[row] = sums.logsumexp;
  if (tail.entropy) tail.entropy[row] = sums.entropy;
}

}  // namespace

void select_with_tail(const SelectWithTailArgs& args, const Processor& processor) {
  const SelectArgs& to = args.select;
  const Tail& tail = args.tail;
  const int k = to.k;
  const DType dtype = to.logits.dtype;
  const SelectTail select_tail = processor.kernels->of(dtype).select_tail;
  // Without given ids those that are selected are left out.
  const bool selected = tail.ids.width == 0;
  const int left_out = selected ? k : static_cast<int>(tail.ids.width);
  const size_t select_bytes = round_up(
      select_scratch_bytes(to.allowed.limit, k, element_size(dtype)), kScratchAlignment);
  const size_t ids_bytes = selected ? 0 : round_up(left_out * sizeof(int32_t), kScratchAlignment);
  const size_t bytes = select_bytes + ids_bytes + tail_scratch_bytes(tail.width, left_out);
  for_each_row(to.logits.count, tail.width, processor.threads, bytes,
               [&](int64_t row, void* scratch) {
                 int32_t* ids = to.ids + row * k;
                 float* values = to.values + row * k;
                 write(tail, row, {0, 0});
                 if (!to.allowed.row(row)) return fill_absent(ids, values, k);
                 const char* logits = to.logits.row(row);
                 char* rest = static_cast<char*>(scratch) + select_bytes;
                 auto* given = reinterpret_cast<int32_t*>(rest);
                 if (!selected) read_ids(tail.ids, row, tail.width, given);
                 const TailOf of{tail.width, tail.temperature.at(row), selected ? ids : given,
                                 left_out, tail.entropy != nullptr};
                 write(tail, row,
                       select_tail(logits, to.allowed.limit, to.allowed.banned, k, scratch, ids,
                                   of, rest + ids_bytes));
                 read_values(logits, dtype, ids, k, values);
               });
}

void tail_logsumexp(const TailArgs& args, const Processor& processor) {
  const Tail& tail = args.tail;
  const int k = static_cast<int>(tail.ids.width);
  const TailSum sum = processor.kernels->of(args.logits.dtype).tail;
  const size_t ids_bytes = round_up(k * sizeof(int32_t), kScratchAlignment);
  const size_t bytes = ids_bytes + tail_scratch_bytes(tail.width, k);
  for_each_row(args.logits.count, tail.width, processor.threads, bytes,
               [&](int64_t row, void* scratch) {
                 write(tail, row, {0, 0});
                 if (args.mask && !args.mask[row]) return;
                 auto* ids = static_cast<int32_t*>(scratch);
                 read_ids(tail.ids, row, tail.width, ids);
                 const TailOf of{tail.width, tail.temperature.at(row), ids, k,
                                 tail.entropy != nullptr};
                 write(tail, row,
                       sum(args.logits.row(row), of, static_cast<char*>(scratch) + ids_bytes));
               });
}

}  // namespace opd::cpu
