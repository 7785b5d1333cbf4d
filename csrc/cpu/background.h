// A row of a gradient's background; compiled once per instruction set.
#pragma once

#include <cstdint>

#include "../common/softmax.h"

namespace opd::cpu {

// out[j] is that of logits[j] for j < width, rounded to the format. `out` may be `logits`.
using BackgroundRow = void (*)(const void* logits, int64_t width, const Softmax& softmax,
                               void* out);

}  // namespace opd::cpu
