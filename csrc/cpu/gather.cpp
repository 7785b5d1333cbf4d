// The student's values at the ids of a support, as floats, and the slots of what is present.

#include "../common/values.h"
#include "kernels.h"
#include "parallel.h"

namespace opd::cpu {

void gather(const GatherArgs& args, const Processor& processor) {
  const int64_t k = args.ids.width;
  for_each_row(args.ids.count, k, processor.threads, 0, [&](int64_t row, void*) {
    const bool unmasked = args.allowed.row(row);
    const char* ids = args.ids.row(row);
    const char* student = args.student.row(row);
    for (int64_t i = 0; i < k; ++i) {
      const int64_t id = unmasked ? id_at(ids, args.ids.dtype, i) : -1;
      const bool present = args.allowed.id(id);
      args.values[row * k + i] = present ? value_at(student, args.student.dtype, id) : 0.0f;
      args.slots[row * k + i] = present ? static_cast<int32_t>(i) : -1;
    }
  });
}

}  // namespace opd::cpu
