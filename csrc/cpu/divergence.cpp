// For each row: selects the support from the teacher's logits or reads a given one, gathers the
// student's values, and computes the renormalised reverse KL and its entry gradients.
//
// Bytes: the teacher's row once, K student elements, 8 K out. Sums over the K entries are
// accumulated in double, which costs nothing beside the teacher's row.

#include <algorithm>
#include <cmath>

#include "../common/divergence.h"
#include "kernels.h"
#include "parallel.h"
#include "values.h"

namespace opd::cpu {
namespace {

// Views into one thread's scratch, K elements each.
struct RowBuffers {
  float* teacher;
  float* student;
  float* log_ratio;
  uint64_t* order;  // for duplicates
  void* select_scratch;

  static size_t bytes(int k) { return k * (3 * sizeof(float) + sizeof(uint64_t)) + 64; }

  RowBuffers(void* scratch, int k) {
    char* begin = static_cast<char*>(scratch);
    order = reinterpret_cast<uint64_t*>(begin);
    teacher = reinterpret_cast<float*>(begin + k * sizeof(uint64_t));
    student = teacher + k;
    log_ratio = student + k;
    const uintptr_t end = reinterpret_cast<uintptr_t>(log_ratio + k);
    select_scratch = reinterpret_cast<void*>((end + 63) & ~uintptr_t(63));
  }
};

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

// Replaces each value by e^((value - max) / T), 0 if it is -inf or absent. Returns the sum.
double exponentials(float* values, int k, float max, float temperature) {
  double sum = 0;
  for (int i = 0; i < k; ++i) {
    values[i] = values[i] == -INFINITY ? 0.0f : expf((values[i] - max) / temperature);
    sum += values[i];
  }
  return sum;
}

// Returns the loss of one row. Afterwards `student` holds p, and `log_ratio` holds log p - log q.
float reverse_kl(const int32_t* ids, int k, float temperature, float teacher_temperature,
                 float* teacher, float* student, float* log_ratio) {
  float student_max = -INFINITY, teacher_max = -INFINITY;
  bool poisoned = false;
  for (int i = 0; i < k; ++i) {
    if (ids[i] < 0) continue;
    poisoned |= poisons(student[i], teacher[i]);
    student_max = student[i] > student_max ? student[i] : student_max;
    teacher_max = teacher[i] > teacher_max ? teacher[i] : teacher_max;
  }
  if (poisoned) return NAN;
  if (student_max == -INFINITY) {
    std::fill_n(student, k, 0.0f);
    return 0;
  }
  const Difference difference(student_max, teacher_max, temperature, teacher_temperature);
  for (int i = 0; i < k; ++i) log_ratio[i] = difference.of(student[i], teacher[i]);
  const auto sum = static_cast<float>(exponentials(student, k, student_max, temperature));
  const auto teacher_sum =
      static_cast<float>(exponentials(teacher, k, teacher_max, teacher_temperature));
  double change = 0, size = 0;
  for (int i = 0; i < k; ++i) teacher[i] = exp_change(student[i], teacher[i], log_ratio[i]);
  for (int i = 0; i < k; ++i) {
    change += teacher[i];
    size += std::fabs(teacher[i]);
  }
  const float log_sums = log_of_ratio(sum, teacher_sum, static_cast<float>(change),
                                      static_cast<float>(size));
  double loss = 0;
  for (int i = 0; i < k; ++i) {
    student[i] /= sum;
    log_ratio[i] -= log_sums;
    loss += entry_loss(student[i], log_ratio[i]);
  }
  return static_cast<float>(loss);
}

// Adds the gradients of repeated ids into the first of them and marks the others absent, so that
// scatter can assign. Only a given support can repeat an id.
void merge_duplicates(int32_t* ids, float* grad, int k, uint64_t* order) {
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

void divergence(const DivergenceArgs& args, const KernelsByDType& kernels, int threads) {
  const int k = args.k;
  const bool given = args.given_support;
  const int64_t limit = args.allowed.limit;
  const SelectRow select_row = given ? nullptr : kernels.of(args.teacher.dtype).select;
  const size_t bytes =
      RowBuffers::bytes(k) +
      (given ? 0 : 64 + select_scratch_bytes(limit, k, element_size(args.teacher.dtype)));

  for_each_row(args.student.count, given ? k : limit, threads, bytes, [&](int64_t row, void* raw) {
    int32_t* ids = args.out_ids + row * k;
    float* grad = args.entry_grad + row * k;
    if (!args.allowed.row(row)) {
      args.loss[row] = 0;
      std::fill_n(ids, k, -1);
      std::fill_n(grad, k, 0.0f);
      return;
    }
    const RowBuffers buffers(raw, k);
    const char* student = args.student.row(row);
    if (given) {
      read_support(args, row, ids, buffers.teacher);
      prefetch(student, args.student.dtype, ids, k);
    } else {
      const char* teacher = args.teacher.row(row);
      select_row(teacher, limit, args.allowed.banned, k, buffers.select_scratch, ids);
      prefetch(student, args.student.dtype, ids, k);
      gather(teacher, args.teacher.dtype, ids, k, buffers.teacher);
    }
    for (int i = 0; i < k; ++i)
      if (buffers.teacher[i] == -INFINITY) ids[i] = -1;
    gather(student, args.student.dtype, ids, k, buffers.student);

    const float temperature = args.temperature.at(row);
    const float loss =
        reverse_kl(ids, k, temperature, args.teacher_temperature.at(row), buffers.teacher,
                   buffers.student, buffers.log_ratio);
    args.loss[row] = loss;
    for (int i = 0; i < k; ++i)
      grad[i] = ids[i] < 0          ? 0.0f
                : std::isnan(loss) ? NAN
                                   : entry_gradient(buffers.student[i], buffers.log_ratio[i], loss,
                                                    temperature);
    if (given) merge_duplicates(ids, grad, k, buffers.order);
  });
}

}  // namespace opd::cpu
