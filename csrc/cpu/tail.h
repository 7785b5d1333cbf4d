// The log-sum-exp of what is outside of a row's support, in the one pass over the row that is made
// anyway; compiled once per instruction set.
//
// The tail may hold 1e-9 of the mass, so it is summed directly and never as 1 - P. A block of the
// row has kTailLanes groups of kTailElements elements each: group l holds every element that passes
// lane l of a vector of floats. Each group has its own maximum m and its sum of exp((x - m) / T),
// which is 1 or more. At the end the groups with an element of the support are summed again without
// it. Then all groups are combined relative to the largest maximum that is left.
//
// Instruction sets without fused multiply-add round differently. Bytes: the row once; scratch for
// two floats a group.
#pragma once

#include <cstddef>
#include <cstdint>

namespace opd::cpu {

constexpr int kTailLanes = 16;
constexpr int kTailElements = 32;
constexpr int64_t kTailBlock = kTailLanes * kTailElements;

// Bytes of scratch, aligned to kScratchAlignment, for rows of this width and k ids.
size_t tail_scratch_bytes(int64_t width, int k);

// log of the sum of exp(x / T) over the ids in [0, width) that are not among `ids`; -inf if there
// are none. Ids outside name nothing, repeated ids count once. NaN if NaN or +inf is
// among what is summed.
using TailSum = double (*)(const void* row, int64_t width, float temperature, const int32_t* ids,
                           int k, void* scratch);

// As SelectRow, and the tail over [0, width) without the ids written, in the same pass. Needs
// limit <= width.
using SelectTail = double (*)(const void* row, int64_t limit, const uint64_t* banned, int k,
                              void* select_scratch, int32_t* ids, int64_t width, float temperature,
                              void* tail_scratch);

}  // namespace opd::cpu
