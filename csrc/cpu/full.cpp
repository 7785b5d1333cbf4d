// For each row: the divergence of a given support with the probability outside of it, its entry
// gradients, and the factor of the student's p in the gradient of everything else.
//
// Bytes: the student's row once where its tail is not given, 16 K in, 8 K out.

#include "../common/full.h"

#include <algorithm>
#include <cmath>

#include "alone.h"
#include "kernels.h"
#include "parallel.h"
#include "values.h"

namespace opd::cpu {
namespace {

// A row's listed ids and the teacher's values at them. `keys` has room for a key of each: the id
// and, in the low bits, its place.
struct Listed {
  static constexpr int kPlaceBits = 10;
  static_assert(kMaxK <= 1 << kPlaceBits);

  const FullDivergenceArgs& args;
  const char* ids;
  const char* values;
  uint64_t* keys;

  Listed(const FullDivergenceArgs& args, int64_t row, void* keys)
      : args(args),
        ids(args.ids.row(row)),
        values(args.teacher.row(row)),
        keys(static_cast<uint64_t*>(keys)) {}

  int64_t id(int place) const { return id_at(ids, args.ids.dtype, place); }
  float value(int place) const { return value_at(values, args.teacher.dtype, place); }

  // Copies the first `count` entries, absent ones as (-1, -inf). Of entries with the same id the
  // first that is present counts, and the others are absent. Calls lost(id, value) for each id
  // without a present entry; `value` is the first that the teacher has there above -inf, if any.
  template <class Lost>
  void read(int count, const Entries& entries, const Lost& lost) const {
    int listed = 0;
    for (int i = 0; i < count; ++i) {
      const bool present = args.allowed.id(id(i)) && value(i) != -INFINITY;
      entries.ids[i] = present ? static_cast<int32_t>(id(i)) : -1;
      entries.teacher[i] = present ? value(i) : -INFINITY;
      if (id(i) >= 0) keys[listed++] = uint64_t(id(i)) << kPlaceBits | i;
    }
    std::sort(keys, keys + listed);
    for (int i = 0; i < listed;) {
      const uint64_t id = keys[i] >> kPlaceBits;
      bool present = false;
      float value = -INFINITY;
      for (; i < listed && keys[i] >> kPlaceBits == id; ++i) {
        const auto place = static_cast<int>(keys[i] & ((1 << kPlaceBits) - 1));
        if (value == -INFINITY) value = this->value(place);
        if (entries.ids[place] < 0) continue;
        if (present) {
          entries.ids[place] = -1;
          entries.teacher[place] = -INFINITY;
        }
        present = true;
      }
      if (!present) lost(static_cast<int64_t>(id), value);
    }
  }
};

void write_row(const FullDivergenceArgs& args, int64_t row, TailSum tail, char* scratch) {
  const int k = static_cast<int>(args.ids.width);
  const bool sampled = args.objective.outside == Outside::kSample;
  const int support = sampled ? k - 1 : k;
  const char* student = args.student.row(row);
  const DType dtype = args.student.dtype;
  const Entries entries{args.out_ids + row * k, args.entry_grad + row * k,
                        reinterpret_cast<float*>(scratch)};
  scratch += round_up(k * sizeof(float), kScratchAlignment);
  const Listed listed(args, row, scratch);
  const double temperature = args.objective.temperature.at(row);
  const double teacher_temperature = args.objective.teacher_temperature.at(row);

  RowTails tails;
  tails.teacher = args.teacher_tail[row];
  if (args.student_tail) tails.student = args.student_tail[row];
  // Both given tails are without all listed ids.
  listed.read(support, entries, [&](int64_t id, float value) {
    if (value != -INFINITY) tails.teacher = log_add(tails.teacher, value / teacher_temperature);
    if (args.student_tail && id < args.width)
      tails.student = log_add(tails.student, value_at(student, dtype, id) / temperature);
  });
  if (args.student_tail)
    prefetch(student, dtype, entries.ids, support);
  else
    tails.student = tail(student,
                         {args.width, args.objective.temperature.at(row), entries.ids, support,
                          false},
                         scratch)
                        .logsumexp;

  Token token;
  const int64_t token_id = sampled ? listed.id(support) : -1;
  if (token_id >= 0 && token_id < args.width && listed.value(support) != -INFINITY)
    token = {true, value_at(student, dtype, token_id), listed.value(support)};
  Alone alone;
  const RowResult result = row_full_divergence(alone, entries, support, student, dtype,
                                               args.objective, tails, token, row);
  if (sampled) {
    // Every id occurs once, even where a row is NaN because its token is out of range.
    const bool apart =
        token.present && std::find(entries.ids, entries.ids + support, token_id) ==
                             entries.ids + support;
    entries.ids[support] = apart ? static_cast<int32_t>(token_id) : -1;
    entries.student[support] = apart ? result.token_grad : 0.0f;
  }
  args.loss[row] = result.loss;
  args.factors[row] = result.factor;
  args.logsumexp[row] = result.logsumexp();
}

// A masked row is not read.
void write_masked_row(const FullDivergenceArgs& args, int64_t row) {
  const int64_t k = args.ids.width;
  std::fill_n(args.out_ids + row * k, k, -1);
  std::fill_n(args.entry_grad + row * k, k, 0.0f);
  args.loss[row] = args.factors[row] = 0;
  args.logsumexp[row] = 0;
}

}  // namespace

void full_divergence(const FullDivergenceArgs& args, const Processor& processor) {
  const int k = static_cast<int>(args.ids.width);
  const TailSum tail = processor.kernels->of(args.student.dtype).tail;
  const int64_t read = args.student_tail ? k : args.width;
  const size_t bytes = round_up(k * sizeof(float), kScratchAlignment) +
                       std::max(k * sizeof(uint64_t),
                                args.student_tail ? 0 : tail_scratch_bytes(args.width, k));
  for_each_row(args.student.count, read, processor.threads, bytes, [&](int64_t row, void* scratch) {
    if (!args.allowed.row(row)) return write_masked_row(args, row);
    write_row(args, row, tail, static_cast<char*>(scratch));
  });
}

}  // namespace opd::cpu
