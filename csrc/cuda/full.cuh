// Any divergence of each row on a given support, and its entry gradients: renormalised, or with
// the probability outside of the support.
//
// A block serves one row. Both tails are given, so a row costs its k entries: an id, a teacher's
// value and one sector of the student's row each, and 8 bytes out. The divergence is data: one
// kernel serves all of them. One thread keeps an entry from reading to writing, so that sums and
// repeated ids alone need barriers.
#pragma once

#include "../common/full.h"
#include "support.cuh"

namespace opd::cuda {

// A team that computes what is the same for a row's entries once. It lies in shared memory: in
// registers of every thread there would be room for fewer blocks.
class RowTeam : public Block {
 public:
  static constexpr int kOnceBytes = 256;

  // `scratch` is for both, at any multiple of 4.
  __device__ explicit RowTeam(char* scratch)
      : Block(scratch),
        next_(scratch + kScratchBytes + reinterpret_cast<uintptr_t>(scratch) % sizeof(double)) {}

  // What make() returns, which one thread calls. Ends with a barrier.
  template <class Make>
  __device__ const auto& once(const Make& make) {
    using Value = decltype(make());
    auto* value = reinterpret_cast<Value*>(next_);
    next_ += (sizeof(Value) + sizeof(double) - 1) / sizeof(double) * sizeof(double);
    if (thread == 0) *value = make();
    __syncthreads();  // the value is written
    return *value;
  }

 private:
  char* next_;
};

// A renormalised divergence on a given support, in any order. As support_divergence_kernel, which
// reverse_kl() has.
__global__ void __launch_bounds__(kEntryThreads, kSupportBlocks)
    support_member_kernel(const __grid_constant__ DivergenceArgs args) {
  const int64_t row = blockIdx.x;
  const int k = args.k;
  const Support support(k);
  RowTeam block(support.scratch);
  if (!args.allowed.row(row)) return write_masked_row(block, args, row);
  read_support(block, args, row, k, support.entries);
  const RowResult result =
      row_full_divergence(block, support.entries, k, args.student.row(row), args.student.dtype,
                          args.objective, RowTails{}, Token{}, row);
  if (block.thread == 0) args.loss[row] = result.loss;
  write_merged(block, support, k, args.out_ids + row * k, args.entry_grad + row * k);
}

// Blocks that share a multiprocessor's registers. For more blocks ptxas would spill.
constexpr int kFullBlocks = 9;

// A row of full_divergence: what is given, and what it has in shared memory.
struct FullRow {
  // What lies outside of the support. Not in registers, of which there are few.
  struct Beyond {
    RowTails tails;
    Token token;
    int32_t token_id;
  };
  const char* student;
  const char* given_ids;
  const char* given_values;
  int k;
  Beyond* beyond;
  int32_t* keys;  // the low halves of the ids
  Entries entries;
  char* scratch;

  __device__ FullRow(const FullDivergenceArgs& args, int64_t row, int k)
      : student(args.student.row(row)),
        given_ids(args.ids.row(row)),
        given_values(args.teacher.row(row)),
        k(k),
        beyond(reinterpret_cast<Beyond*>(shared_memory())),
        keys(reinterpret_cast<int32_t*>(beyond + 1)) {
    auto* values = reinterpret_cast<float*>(keys + 2 * k);
    entries = {keys + k, values, values + k};
    scratch = reinterpret_cast<char*>(values + 2 * k);
  }

  static int bytes(int k) {
    return static_cast<int>(sizeof(Beyond) + 4 * k * sizeof(int32_t)) + Block::kScratchBytes +
           RowTeam::kOnceBytes;
  }

  __device__ int64_t id(const FullDivergenceArgs& args, int place) const {
    return id_at(given_ids, args.ids.dtype, place);
  }
  __device__ float value(const FullDivergenceArgs& args, int place) const {
    return value_at(given_values, args.teacher.dtype, place);
  }
};

// In place of an entry's id: none of the entries with this id is present, so that it belongs to the
// tails. One of them stands for all.
constexpr int32_t kLost = -2;

// Reads the k entries. Of entries with the same id one stands for all, and the others are absent:
// the first whose teacher value is above -inf, or the first if there is none. Most rows have no
// repeats, and comparing all pairs takes fewer instructions than sorting would.
__device__ inline void read_once(const Block& block, const FullDivergenceArgs& args,
                                 const FullRow& row) {
  const Entries& entries = row.entries;
  block.for_entries(row.k, [&](int i) {
    row.keys[i] = static_cast<int32_t>(row.id(args, i));
    entries.teacher[i] = row.value(args, i);
  });
  __syncthreads();  // all keys and values are written
  block.for_entries(row.k, [&](int i) {
    const int64_t id = row.id(args, i);
    const int32_t key = row.keys[i];
    const bool valued = entries.teacher[i] != -INFINITY;
    bool stands = id >= 0;
    for (int j = 0; j < row.k; ++j) {
      if (row.keys[j] != key || j == i) continue;
      const bool other_valued = entries.teacher[j] != -INFINITY;
      const bool other_first = other_valued != valued ? other_valued : j < i;
      if (other_first && row.id(args, j) == id) stands = false;
    }
    entries.ids[i] = !stands ? -1 : args.allowed.id(id) && valued ? key : kLost;
  });
}

// One thread writes the tails of what is not an entry: those that are given, which are without all
// listed ids, and the ids that are lost.
__device__ inline void write_tails(Block& block, const FullDivergenceArgs& args, int64_t number,
                                   const FullRow& row) {
  const Entries& entries = row.entries;
  struct OfSides {
    float student, teacher;
  } most{-INFINITY, -INFINITY}, sums{0, 0};
  int lost = 0;
  block.for_entries(row.k, [&](int i) {
    if (entries.ids[i] != kLost) return;
    const int64_t id = row.id(args, i);
    const float z = id < args.width ? value_at(row.student, args.student.dtype, id) : -INFINITY;
    entries.student[i] = z;
    most = {larger(most.student, z), larger(most.teacher, entries.teacher[i])};
    ++lost;
  });
  const float temperature = args.objective.temperature.at(number);
  const float teacher_temperature = args.objective.teacher_temperature.at(number);
  if (block.sum(lost) > 0) {
    most = block.combine(most, [](const OfSides& a, const OfSides& b) {
      return OfSides{larger(a.student, b.student), larger(a.teacher, b.teacher)};
    });
    block.for_entries(row.k, [&](int i) {
      if (entries.ids[i] != kLost) return;
      entries.ids[i] = -1;
      sums.student += exponential(entries.student[i], most.student, temperature);
      sums.teacher += exponential(entries.teacher[i], most.teacher, teacher_temperature);
    });
    sums = block.combine(sums, [](const OfSides& a, const OfSides& b) {
      return OfSides{a.student + b.student, a.teacher + b.teacher};
    });
  }
  if (block.thread > 0) return;
  const auto joined = [](double tail, float most, float sum, float temperature) {
    if (sum == 0) return tail;
    return log_add(tail, most * reciprocal(temperature) + log(static_cast<double>(sum)));
  };
  row.beyond->tails = {
      joined(args.student_tail[number], most.student, sums.student, temperature),
      joined(args.teacher_tail[number], most.teacher, sums.teacher, teacher_temperature)};
}

// A divergence with the probability outside of the support. A block serves one row.
__global__ void __launch_bounds__(kEntryThreads, kFullBlocks)
    full_divergence_kernel(const __grid_constant__ FullDivergenceArgs args) {
  const int64_t number = blockIdx.x;
  const int width = static_cast<int>(args.ids.width);
  const bool sampled = args.objective.outside == Outside::kSample;
  const int k = sampled ? width - 1 : width;
  const auto out_id = [&](int i) -> int32_t& { return args.out_ids[number * width + i]; };
  const auto out_grad = [&](int i) -> float& { return args.entry_grad[number * width + i]; };
  const FullRow row(args, number, k);
  const Entries& entries = row.entries;
  FullRow::Beyond& beyond = *row.beyond;
  RowTeam block(row.scratch);
  if (!args.allowed.row(number)) {  // is not read
    block.for_entries(width, [&](int i) { out_id(i) = -1, out_grad(i) = 0; });
    if (block.thread == 0)
      args.loss[number] = args.factors[number] = 0, args.logsumexp[number] = 0;
    return;
  }
  read_once(block, args, row);
  write_tails(block, args, number, row);
  if (block.thread == 0) {
    const int64_t id = sampled ? row.id(args, k) : -1;
    const bool present = id >= 0 && id < args.width && row.value(args, k) != -INFINITY;
    beyond.token = {};
    if (present)
      beyond.token = {true, value_at(row.student, args.student.dtype, id), row.value(args, k)};
    beyond.token_id = present ? static_cast<int32_t>(id) : -1;
  }

  // What lies beyond is read behind the barrier of its first exchange.
  const RowResult result =
      row_full_divergence(block, entries, k, row.student, args.student.dtype, args.objective,
                          beyond.tails, beyond.token, number);
  int repeats = 0;
  block.for_entries(k, [&](int i) {
    out_id(i) = entries.ids[i];
    out_grad(i) = entries.student[i];
    repeats += entries.ids[i] == beyond.token_id;
  });
  if (sampled) {
    // Every id occurs once, even where a row is NaN because its token is out of range.
    const bool apart = block.sum(repeats) == 0 && beyond.token_id >= 0;
    if (block.thread == 0) {
      out_id(k) = apart ? beyond.token_id : -1;
      out_grad(k) = apart ? result.token_grad : 0.0f;
    }
  }
  if (block.thread == 0) {
    args.loss[number] = result.loss;
    args.factors[number] = result.factor;
    args.logsumexp[number] = result.logsumexp();
  }
}

}  // namespace opd::cuda
