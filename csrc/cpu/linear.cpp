// A head's logits at a few ids of each row, and the gradients of hidden states and weight.
//
// Bytes of a row with k ids: k weight rows for the logits, k more for the hidden state's gradient.
// The weight's gradient is summed id by id. The entries are sorted by id, stably: one thread writes
// each row of the gradient once and adds in the order of the tokens. Rows that no entry touches
// stay zero.

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "../common/values.h"
#include "kernels.h"
#include "parallel.h"

namespace opd::cpu {
namespace {

// Views into one thread's scratch: padded rows of floats, and room for a number of factors and of
// pointers to the rows that they multiply.
struct Terms {
  float* sum;
  float* piece;  // the second row of floats, if there is one
  float* factors;
  const void** rows;

  static size_t bytes(int64_t width, int64_t count, int rows = 1) {
    return rows * padded(width) * sizeof(float) + count * (sizeof(float) + sizeof(void*));
  }

  Terms(void* scratch, int64_t width, int64_t count, int rows_of_floats = 1) {
    char* begin = static_cast<char*>(scratch);
    rows = reinterpret_cast<const void**>(begin);
    sum = reinterpret_cast<float*>(begin + count * sizeof(void*));
    piece = sum + padded(width);
    factors = sum + rows_of_floats * padded(width);
  }
};

// Sums of more products are cut into pieces of this many.
constexpr int64_t kPiece = 512;
// The gradient's rows of ids with more than a run's share of the entries are cut into pieces of
// this many columns.
constexpr int64_t kHotColumns = 4 * kBlock;
// Runs of tasks for each thread, and the fewest products of a run.
constexpr int64_t kRunsOfThread = 16;
constexpr int64_t kProductsOfRun = 1 << 15;

// Entries (row * k + slot) with a gradient other than 0, sorted by id. The entries of an id are
// entries[first[id]] to entries[first[id + 1] - 1], in the order of the rows.
struct Sorted {
  std::vector<uint32_t> first;
  std::vector<uint32_t> entries;
};

template <class Body>
void for_each_entry(const GatherDotWeightArgs& args, const Body& body) {
  for (int64_t row = 0; row < args.ids.count; ++row) {
    const char* ids = args.ids.row(row);
    for (int i = 0; i < args.k; ++i) {
      if (args.upstream[row * args.k + i] == 0) continue;
      const int64_t id = id_at(ids, args.ids.dtype, i);
      if (id >= 0 && id < args.out.count) body(id, static_cast<uint32_t>(row * args.k + i));
    }
  }
}

Sorted sort_by_id(const GatherDotWeightArgs& args) {
  Sorted sorted;
  auto& first = sorted.first;
  first.assign(args.out.count + 2, 0);
  for_each_entry(args, [&](int64_t id, uint32_t) { ++first[id + 2]; });
  for (size_t id = 2; id < first.size(); ++id) first[id] += first[id - 1];
  sorted.entries.resize(first.back());
  // Before this loop first[id + 1] is where the entries of id begin, after it where they end.
  for_each_entry(args,
                 [&](int64_t id, uint32_t entry) { sorted.entries[first[id + 1]++] = entry; });
  first.pop_back();
  return sorted;
}

// Columns [column, column + width) of one row of the weight's gradient.
struct Task {
  int64_t id;
  int64_t column;
  int64_t width;
};

// Tasks in runs of about equal work. In most vocabularies a few low ids have most of the entries.
struct Plan {
  std::vector<Task> tasks;
  std::vector<size_t> ends;  // of each run
};

Plan plan_of(const Sorted& sorted, int64_t vocab, int64_t width, int threads) {
  Plan plan;
  const int64_t products = static_cast<int64_t>(sorted.entries.size()) * width;
  const int64_t share = std::max(products / (kRunsOfThread * threads), kProductsOfRun);
  int64_t work = 0;
  for (int64_t id = 0; id < vocab; ++id) {
    const int64_t entries = sorted.first[id + 1] - sorted.first[id];
    if (entries == 0) continue;
    const int64_t columns = entries * width <= share ? width : kHotColumns;
    for (int64_t column = 0; column < width; column += columns) {
      plan.tasks.push_back({id, column, std::min(columns, width - column)});
      work += entries * plan.tasks.back().width;
      if (work < share) continue;
      plan.ends.push_back(plan.tasks.size());
      work = 0;
    }
  }
  if (work > 0) plan.ends.push_back(plan.tasks.size());
  return plan;
}

// sum += factor * hidden of `count` entries, at most kPiece.
void add_entries(const GatherDotWeightArgs& args, const uint32_t* entries, int64_t count,
                 const Task& task, AddRows add_rows, const Terms& terms, float* sum) {
  const int64_t offset = task.column * element_size(args.hidden.dtype);
  for (int64_t i = 0; i < count; ++i) {
    terms.factors[i] = args.upstream[entries[i]];
    terms.rows[i] = args.hidden.row(entries[i] / args.k) + offset;
  }
  add_rows(terms.factors, terms.rows, count, task.width, sum);
}

// A long sum is the sum of sums of kPiece products each, which rounds less.
void sum_task(const GatherDotWeightArgs& args, const KernelsByDType& kernels, const Sorted& sorted,
              const Task& task, const Terms& terms) {
  const AddRows add_rows = kernels.of(args.hidden.dtype).add_rows;
  const AddRows add_floats = kernels.of(DType::kFloat32).add_rows;
  const uint32_t* entries = sorted.entries.data() + sorted.first[task.id];
  const int64_t count = sorted.first[task.id + 1] - sorted.first[task.id];
  std::fill_n(terms.sum, padded(task.width), 0.0f);
  if (count <= kPiece) {
    add_entries(args, entries, count, task, add_rows, terms, terms.sum);
  } else {
    const float one = 1;
    const void* const piece = terms.piece;
    for (int64_t done = 0; done < count; done += kPiece) {
      std::fill_n(terms.piece, padded(task.width), 0.0f);
      const int64_t next = std::min(kPiece, count - done);
      add_entries(args, entries + done, next, task, add_rows, terms, terms.piece);
      add_floats(&one, &piece, 1, task.width, terms.sum);
    }
  }
  char* out = args.out.row(task.id) + task.column * element_size(args.out.dtype);
  kernels.of(args.out.dtype).round(terms.sum, task.width, out);
}

}  // namespace

void gather_dot(const GatherDotArgs& args, const Processor& processor) {
  const int k = args.k;
  const int64_t width = args.hidden.width;
  const Widen widen = processor.kernels->of(args.hidden.dtype).widen;
  const Dots dots = processor.kernels->of(args.weight.dtype).dots;
  for_each_row(args.hidden.count, k * width, processor.threads, Terms::bytes(width, k),
               [&](int64_t row, void* scratch) {
                 float* logits = args.logits + row * k;
                 int32_t* slots = args.slots + row * k;
                 std::fill_n(logits, k, 0.0f);
                 std::fill_n(slots, k, -1);
                 if (!args.allowed.row(row)) return;
                 const Terms terms(scratch, width, k);
                 const char* ids = args.ids.row(row);
                 int present = 0;
                 for (int i = 0; i < k; ++i) {
                   const int64_t id = id_at(ids, args.ids.dtype, i);
                   if (!args.allowed.id(id)) continue;
                   slots[i] = i;
                   terms.rows[present++] = args.weight.row(id);
                 }
                 if (present == 0) return;
                 widen(args.hidden.row(row), width, terms.sum);
                 dots(terms.sum, terms.rows, present, width, terms.factors);
                 for (int i = 0, j = 0; i < k; ++i) {
                   if (slots[i] < 0) continue;
                   logits[i] = terms.factors[j++];
                   if (args.bias) {
                     const int64_t id = id_at(ids, args.ids.dtype, i);
                     logits[i] += value_at(args.bias, args.bias_dtype, id);
                   }
                 }
               });
}

void gather_dot_hidden(const GatherDotHiddenArgs& args, const Processor& processor) {
  const int k = args.k;
  const int64_t width = args.out.width;
  const AddRows add_rows = processor.kernels->of(args.weight.dtype).add_rows;
  const Round round = processor.kernels->of(args.out.dtype).round;
  for_each_row(args.out.count, k * width, processor.threads, Terms::bytes(width, k),
               [&](int64_t row, void* scratch) {
                 const Terms terms(scratch, width, k);
                 const char* ids = args.ids.row(row);
                 const float* upstream = args.upstream + row * k;
                 int count = 0;
                 for (int i = 0; i < k; ++i) {
                   if (upstream[i] == 0) continue;
                   const int64_t id = id_at(ids, args.ids.dtype, i);
                   if (id < 0 || id >= args.weight.count) continue;
                   terms.factors[count] = upstream[i];
                   terms.rows[count++] = args.weight.row(id);
                 }
                 std::fill_n(terms.sum, padded(width), 0.0f);
                 add_rows(terms.factors, terms.rows, count, width, terms.sum);
                 round(terms.sum, width, args.out.row(row));
               });
}

void gather_dot_weight(const GatherDotWeightArgs& args, const Processor& processor) {
  const int64_t width = args.out.width;
  if (args.ids.count > int64_t{0xffffffff} / args.k)
    throw std::invalid_argument("2^32 entries or more; pass fewer rows at once");
  const Sorted sorted = sort_by_id(args);
  const Plan plan = plan_of(sorted, args.out.count, width, processor.threads);
  for_each_row(static_cast<int64_t>(plan.ends.size()), kProductsOfRun, processor.threads,
               Terms::bytes(width, kPiece, 2), [&](int64_t run, void* scratch) {
                 const Terms terms(scratch, width, kPiece, 2);
                 for (size_t i = run > 0 ? plan.ends[run - 1] : 0; i < plan.ends[run]; ++i)
                   sum_task(args, *processor.kernels, sorted, plan.tasks[i], terms);
               });
}

}  // namespace opd::cpu
