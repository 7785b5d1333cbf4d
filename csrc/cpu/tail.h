// The log-sum-exp of what is outside of a row's support, and the entropy of its own softmax, in the
// one pass over the row that is made anyway; compiled once per instruction set.
//
// The tail may hold 1e-9 of the mass, so it is summed directly and never as 1 - P. A block of the
// row has kTailLanes groups of kTailElements elements each: group l holds every element that passes
// lane l of a vector of floats. Each group has its own maximum m and its sum of exp((x - m) / T),
// which is 1 or more, and for the entropy that of exp((x - m) / T) (x - m). At the end the groups with an element of the support are summed again without
// it. Then all groups are combined relative to the largest maximum that is left.
//
// Instruction sets without fused multiply-add round differently. Bytes: the row once; scratch for
// three floats a group.
#pragma once

#include <cstddef>
#include <cstdint>

namespace opd::cpu {

constexpr int kTailLanes = 16;
constexpr int kTailElements = 32;
constexpr int64_t kTailBlock = kTailLanes * kTailElements;

// Bytes of scratch, aligned to kScratchAlignment, for rows of this width and k ids.
size_t tail_scratch_bytes(int64_t width, int k);

// What a tail is: x / T over the ids in [0, width) that are not among `ids`. Ids outside name
// nothing, repeated ids count once.
struct TailOf {
  int64_t width;
  float temperature;
  const int32_t* ids;
  int k;
  bool with_entropy;
};

// NaN if NaN or +inf is among what is summed.
struct TailSums {
  double logsumexp;  // -inf if there is nothing
  double entropy;    // of exp(x / T - logsumexp), in nats; 0 if there is nothing
};

using TailSum = TailSums (*)(const void* row, const TailOf& tail, void* scratch);

// As SelectRow, and a tail in the same pass. Its ids may be those that are written. Needs
// limit <= width.
using SelectTail = TailSums (*)(const void* row, int64_t limit, const uint64_t* banned, int k,
                                void* select_scratch, int32_t* ids, const TailOf& tail,
                                void* tail_scratch);

}  // namespace opd::cpu
