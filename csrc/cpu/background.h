// A row of a gradient's background; compiled once per instruction set.
#pragma once

#include <cstdint>

namespace opd::cpu {

// factor exp(z / T - logsumexp) = scale exp((z - middle) / T). `middle` is near T logsumexp:
// however small T is, the difference is exact where it matters, and scale / factor is between 1 / V
// and V.
struct Softmax {
  float middle;
  float temperature;
  float scale;
};

// out[j] is that of logits[j] for j < width, rounded to the format. `out` may be `logits`.
using BackgroundRow = void (*)(const void* logits, int64_t width, const Softmax& softmax,
                               void* out);

}  // namespace opd::cpu
