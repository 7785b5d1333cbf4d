// For each row: selects the support from the teacher's logits or reads a given one, and computes a
// renormalised divergence and its entry gradients.
//
// Bytes: the teacher's row once, K student elements, 8 K out.

#include <algorithm>
#include <cmath>

#include "../common/divergence.h"
#include "../common/full.h"
#include "alone.h"
#include "kernels.h"
#include "parallel.h"
#include "values.h"

namespace opd::cpu {
namespace {

// Ids and gradients take their final place, the teacher's values lie in scratch.
Entries entries_of(const DivergenceArgs& args, int64_t row, float* teacher) {
  return {args.out_ids + row * args.k, args.entry_grad + row * args.k, teacher};
}

void write_row(const DivergenceArgs& args, int64_t row, const Entries& entries) {
  Alone alone;
  const char* student = args.student.row(row);
  const DType dtype = args.student.dtype;
  args.loss[row] =
      args.objective.is_reverse_kl()
          ? row_divergence(alone, entries, args.k, student, dtype, args.objective, row)
          : row_full_divergence(alone, entries, args.k, student, dtype, args.objective, RowTails{},
                                Token{}, row)
                .loss;
}

// A masked row is not read.
void write_masked_row(const DivergenceArgs& args, int64_t row) {
  args.loss[row] = 0;
  std::fill_n(args.out_ids + row * args.k, args.k, -1);
  std::fill_n(args.entry_grad + row * args.k, args.k, 0.0f);
}

// Copies a given support, with absent entries as (-1, -inf).
void read_support(const DivergenceArgs& args, int64_t row, int32_t* ids, float* values) {
  const char* given_ids = args.ids.row(row);
  const char* given_values = args.teacher.row(row);
  for (int i = 0; i < args.k; ++i) {
    const int64_t id = id_at(given_ids, args.ids.dtype, i);
    ids[i] = args.allowed.id(id) ? static_cast<int32_t>(id) : -1;
    values[i] = ids[i] < 0 ? -INFINITY : value_at(given_values, args.teacher.dtype, i);
  }
}

// Whether it is certain that no id is repeated: each has a bit of its own, chosen by its low bits.
bool are_different(const int32_t* ids, int k) {
  constexpr int kWords = 1 << 10;  // for 64 ids in random places a collision in 3 of 100 rows
  uint64_t seen[kWords] = {};
  for (int i = 0; i < k; ++i) {
    if (ids[i] < 0) continue;
    const uint64_t bit = uint64_t(1) << (ids[i] & 63);
    uint64_t& word = seen[(ids[i] >> 6) % kWords];
    if (word & bit) return false;
    word |= bit;
  }
  return true;
}

// Adds the gradients of repeated ids into the first of them and marks the others absent, so that
// scatter can assign. Only a given support can repeat an id.
void merge_duplicates(int32_t* ids, float* grad, int k, uint64_t* order) {
  if (are_different(ids, k)) return;
  int present = 0;
  for (int i = 0; i < k; ++i)
    if (ids[i] >= 0) order[present++] = (uint64_t(ids[i]) << 32) | uint32_t(i);
  std::sort(order, order + present);
  for (int i = 0; i < present;) {
    const int first = static_cast<int>(order[i] & 0xffffffffu);
    double sum = grad[first];
    int j = i + 1;
    for (; j < present && (order[j] >> 32) == (order[i] >> 32); ++j) {
      const int repeat = static_cast<int>(order[j] & 0xffffffffu);
      sum += grad[repeat];
      grad[repeat] = 0;
      ids[repeat] = -1;
    }
    if (j > i + 1) grad[first] = finite(sum);
    i = j;
  }
}

}  // namespace

void select_divergence(const DivergenceArgs& args, const Processor& processor) {
  const int k = args.k;
  const int64_t limit = args.allowed.limit;
  const DType dtype = args.teacher.dtype;
  const SelectRow select_row = processor.kernels->of(dtype).select;
  const size_t values = round_up(k * sizeof(float), kScratchAlignment);
  const size_t bytes = values + select_scratch_bytes(limit, k, element_size(dtype));
  for_each_row(args.student.count, limit, processor.threads, bytes, [&](int64_t row, void* raw) {
    if (!args.allowed.row(row)) return write_masked_row(args, row);
    const Entries entries = entries_of(args, row, static_cast<float*>(raw));
    const char* teacher = args.teacher.row(row);
    select_row(teacher, limit, args.allowed.banned, k, static_cast<char*>(raw) + values,
               entries.ids);
    prefetch(args.student.row(row), args.student.dtype, entries.ids, k);
    read_values(teacher, dtype, entries.ids, k, entries.teacher);
    write_row(args, row, entries);
  });
}

void entry_divergence(const DivergenceArgs& args, const Processor& processor) {
  const int k = args.k;
  const size_t values = round_up(k * sizeof(float), alignof(uint64_t));
  const size_t bytes = values + k * sizeof(uint64_t);
  for_each_row(args.student.count, k, processor.threads, bytes, [&](int64_t row, void* raw) {
    if (!args.allowed.row(row)) return write_masked_row(args, row);
    const Entries entries = entries_of(args, row, static_cast<float*>(raw));
    read_support(args, row, entries.ids, entries.teacher);
    prefetch(args.student.row(row), args.student.dtype, entries.ids, k);
    write_row(args, row, entries);
    auto* order = reinterpret_cast<uint64_t*>(static_cast<char*>(raw) + values);
    merge_duplicates(entries.ids, entries.student, k, order);
  });
}

}  // namespace opd::cpu
