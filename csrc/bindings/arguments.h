// Arguments that both compiled modules take from Python: addresses and dtypes by name, no torch. All
// are positional, which Python passes fastest.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>

#include "../common/arguments.h"

namespace opd {

namespace py = pybind11;

inline DType dtype_of(const std::string& name) {
  static const std::map<std::string, DType> dtypes = {{"float32", DType::kFloat32},
                                                      {"float16", DType::kFloat16},
                                                      {"bfloat16", DType::kBFloat16},
                                                      {"int32", DType::kInt32},
                                                      {"int64", DType::kInt64}};
  const auto found = dtypes.find(name);
  if (found == dtypes.end()) throw std::invalid_argument("no kernel reads dtype '" + name + "'");
  return found->second;
}

inline ScatterMode scatter_mode(const std::string& name) {
  if (name == "assign") return ScatterMode::kAssign;
  if (name == "clear") return ScatterMode::kClear;
  if (name == "add") return ScatterMode::kAdd;
  throw std::invalid_argument("scatter has no mode '" + name + "'");
}

inline Outside outside_of(const std::string& name) {
  static const std::map<std::string, Outside> names = {{"renormalize", Outside::kRenormalize},
                                                       {"truncate", Outside::kTruncate},
                                                       {"bucket", Outside::kBucket},
                                                       {"generalize", Outside::kGeneralize},
                                                       {"sample", Outside::kSample}};
  const auto found = names.find(name);
  if (found == names.end()) throw std::invalid_argument("there is no outside '" + name + "'");
  return found->second;
}

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

inline bool is_floating(const Rows& rows) {
  return rows.dtype != DType::kInt32 && rows.dtype != DType::kInt64;
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Defines the argument classes; each module has its own.
inline void define_arguments(py::module_& m) {
  py::class_<Rows>(m, "Rows", py::module_local(), "(data, dtype, shape, strides)")
      .def(py::init([](uintptr_t data, const std::string& dtype, const std::vector<int64_t>& shape,
                       const std::vector<int64_t>& strides) {
        return make_rows(data, dtype_of(dtype), shape, strides);
      }));

  py::class_<Allowed>(m, "Allowed", py::module_local(), "(limit, banned, mask)")
      .def(py::init([](int64_t limit, uintptr_t banned, uintptr_t mask) {
        return Allowed{limit, pointer<const uint64_t>(banned), pointer<const bool>(mask)};
      }));

  py::class_<Divergence>(m, "Divergence", py::module_local(), "Takes the fields of Python's.")
      .def(py::init([](float reverse, float forward, float skew_reverse, float skew_forward,
                       float beta, bool stop_ratio, std::optional<float> log_ratio_clip,
                       std::optional<float> logp_floor) {
        return Divergence{reverse,
                          forward,
                          skew_reverse,
                          skew_forward,
                          beta,
                          stop_ratio,
                          log_ratio_clip.value_or(INFINITY),
                          logp_floor.value_or(-INFINITY)};
      }));

  py::class_<Objective>(m, "Objective", py::module_local(),
                        "(temperature, its rows, the teacher's, its rows, divergence, weights of "
                        "rows, outside)")
      .def(py::init([](float temperature, uintptr_t rows, float teacher_temperature,
                       uintptr_t teacher_rows, const Divergence& divergence, uintptr_t weights,
                       const std::string& outside) {
        return Objective{{temperature, pointer<const float>(rows)},
                         {teacher_temperature, pointer<const float>(teacher_rows)},
                         divergence,
                         pointer<const float>(weights),
                         outside_of(outside)};
      }));

  py::class_<Tail>(m, "Tail", py::module_local(),
                   "(width, temperature, its rows, ids or None, log-sum-exps, entropies)")
      .def(py::init([](int64_t width, float temperature, uintptr_t rows, const Rows* ids,
                       uintptr_t logsumexp, uintptr_t entropy) {
        return Tail{width,
                    {temperature, pointer<const float>(rows)},
                    ids ? *ids : Rows{},
                    pointer<double>(logsumexp),
                    pointer<double>(entropy)};
      }));
}

// Defines an operator: from what it runs on and its arguments it builds a struct, which it launches.
template <class How, class Args, class... Parameters>
void define(py::module_& m, const char* name, Args (*build)(Parameters...),
            void (*launch)(const Args&, const How&)) {
  m.def(name, [build, launch](const How& how, Parameters... parameters) {
    const Args args = build(parameters...);
    py::gil_scoped_release release;
    launch(args, how);
  });
}

inline SelectArgs select_args(const Rows& logits, const Allowed& allowed, int k, uintptr_t ids,
                              uintptr_t values) {
  require(k >= 1 && k <= kMaxK, "k is outside [1, max_k]");
  require(is_floating(logits), "the logits are integers");
  require(allowed.limit <= logits.width, "the limit is beyond the logits' vocabulary");
  return {logits, allowed, k, pointer<int32_t>(ids), pointer<float>(values)};
}

// Checks that a tail lies in the logits' rows.
inline void require_tail(const Tail& tail, const Rows& logits) {
  require(0 <= tail.width && tail.width <= logits.width,
          "the tail's width is beyond the logits' vocabulary");
  if (tail.ids.width == 0) return;
  require(!is_floating(tail.ids) && tail.ids.count == logits.count,
          "the tail's ids are no integers of the same rows");
  require(tail.ids.width <= kMaxK, "the tail leaves out more than max_k ids");
}

inline GatherArgs gather_args(const Rows& student, const Rows& ids, const Allowed& allowed,
                              uintptr_t values, uintptr_t slots) {
  require(student.count == ids.count, "student and ids differ in rows");
  require(is_floating(student), "the student is integers");
  require(!is_floating(ids), "the support's ids are no integers");
  require(allowed.limit <= student.width, "the limit is beyond the student's vocabulary");
  return {student, ids, allowed, pointer<float>(values), pointer<int32_t>(slots)};
}

inline DivergenceArgs divergence_args(const Rows& student, const Rows& teacher, const Rows& ids,
                                      const Allowed& allowed, int k, const Objective& objective,
                                      uintptr_t loss, uintptr_t out_ids, uintptr_t entry_grad) {
  require(k >= 1 && k <= kMaxK, "k is outside [1, max_k]");
  require(student.count == teacher.count, "student and teacher differ in rows");
  require(is_floating(student) && is_floating(teacher), "student or teacher are integers");
  require(allowed.limit <= student.width, "the limit is beyond the student's vocabulary");
  require(objective.outside == Outside::kRenormalize, "the divergence is not renormalised");
  return {student,
          teacher,
          ids,
          allowed,
          k,
          objective,
          pointer<float>(loss),
          pointer<int32_t>(out_ids),
          pointer<float>(entry_grad)};
}

inline DivergenceArgs select_divergence_args(const Rows& student, const Rows& teacher,
                                             const Allowed& allowed, int k,
                                             const Objective& objective, uintptr_t loss,
                                             uintptr_t out_ids, uintptr_t entry_grad) {
  require(allowed.limit <= teacher.width, "the limit is beyond the teacher's vocabulary");
  return divergence_args(student, teacher, Rows{}, allowed, k, objective, loss, out_ids,
                         entry_grad);
}

inline DivergenceArgs entry_divergence_args(const Rows& student, const Rows& teacher,
                                            const Rows& ids, const Allowed& allowed,
                                            const Objective& objective, uintptr_t loss,
                                            uintptr_t out_ids, uintptr_t entry_grad) {
  require(!is_floating(ids), "the support's ids are no integers");
  require(ids.count == student.count && ids.width == teacher.width,
          "the support's ids or values are not (rows, k)");
  require(ids.width <= kMaxK, "k is outside [1, max_k]");
  return divergence_args(student, teacher, ids, allowed, static_cast<int>(ids.width), objective,
                         loss, out_ids, entry_grad);
}

inline ScatterArgs scatter_args(const Rows& out, uintptr_t ids, uintptr_t entry_grad,
                                uintptr_t upstream, int k, const std::string& mode) {
  require(is_floating(out), "the gradient is of integers");
  return {out,
          pointer<const int32_t>(ids),
          pointer<const float>(entry_grad),
          pointer<const float>(upstream),
          k,
          scatter_mode(mode)};
}

inline SelectWithTailArgs select_with_tail_args(const Rows& logits, const Allowed& allowed, int k,
                                                uintptr_t ids, uintptr_t values,
                                                const Tail& tail) {
  require_tail(tail, logits);
  require(allowed.limit <= tail.width, "the limit is beyond the tail's width");
  return {select_args(logits, allowed, k, ids, values), tail};
}

inline TailArgs tail_args(const Rows& logits, uintptr_t mask, const Tail& tail) {
  require(is_floating(logits), "the logits are integers");
  require_tail(tail, logits);
  return {logits, pointer<const bool>(mask), tail};
}

inline FullDivergenceArgs full_divergence_args(const Rows& student, const Rows& teacher,
                                               const Rows& ids, const Allowed& allowed,
                                               const Objective& objective, uintptr_t teacher_tail,
                                               uintptr_t student_tail, int64_t width,
                                               uintptr_t loss, uintptr_t out_ids,
                                               uintptr_t entry_grad, uintptr_t factors,
                                               uintptr_t logsumexp) {
  require(objective.outside != Outside::kRenormalize, "the divergence is renormalised");
  require(is_floating(student) && is_floating(teacher), "student or teacher are integers");
  require(!is_floating(ids), "the support's ids are no integers");
  require(student.count == teacher.count && ids.count == teacher.count &&
              ids.width == teacher.width,
          "student, values and ids do not fit each other");
  require(ids.width >= 1 && ids.width <= kMaxK, "k is outside [1, max_k]");
  require(allowed.limit <= student.width, "the limit is beyond the student's vocabulary");
  require(0 <= width && width <= student.width, "the width is beyond the student's vocabulary");
  return {student,
          teacher,
          ids,
          allowed,
          objective,
          pointer<const double>(teacher_tail),
          pointer<const double>(student_tail),
          width,
          pointer<float>(loss),
          pointer<int32_t>(out_ids),
          pointer<float>(entry_grad),
          pointer<float>(factors),
          pointer<double>(logsumexp)};
}

inline BackgroundArgs background_args(const Rows& out, uintptr_t ids, uintptr_t entry_grad,
                                      uintptr_t upstream, int k, const std::string& mode,
                                      const Rows& logits, uintptr_t factors, uintptr_t logsumexp,
                                      int64_t limit, float temperature,
                                      uintptr_t temperature_rows) {
  const ScatterArgs scatter = scatter_args(out, ids, entry_grad, upstream, k, mode);
  require(scatter.mode != ScatterMode::kAdd, "a background cannot be added");
  require(logits.dtype == out.dtype && logits.count == out.count,
          "logits and gradient differ in rows or dtype");
  require(0 <= limit && limit <= out.width && limit <= logits.width,
          "the background's limit is beyond the vocabulary");
  return {scatter,
          logits,
          pointer<const float>(factors),
          pointer<const double>(logsumexp),
          limit,
          {temperature, pointer<const float>(temperature_rows)}};
}

// Checks that ids, hidden states and weight have fitting sizes and dtypes.
inline void require_support(const Rows& ids, const Rows& hidden, const Rows& weight, int k) {
  require(ids.width == k && ids.count == hidden.count, "ids are not (rows, k)");
  require(!is_floating(ids), "ids are no integers");
  require(is_floating(hidden) && is_floating(weight), "hidden states or weight are integers");
  require(hidden.width == weight.width, "hidden states and weight differ in width");
}

inline GatherDotArgs gather_dot_args(const Rows& hidden, const Rows& weight, uintptr_t bias,
                                     const std::string& bias_dtype, const Rows& ids,
                                     const Allowed& allowed, int k, uintptr_t logits,
                                     uintptr_t slots) {
  require_support(ids, hidden, weight, k);
  require(allowed.limit <= weight.count, "the limit is beyond the weight's rows");
  return {hidden,  weight, pointer<const char>(bias), dtype_of(bias_dtype), ids,
          allowed, k,      pointer<float>(logits),    pointer<int32_t>(slots)};
}

inline GatherDotHiddenArgs gather_dot_hidden_args(uintptr_t upstream, const Rows& ids,
                                                  const Rows& weight, int k, const Rows& out) {
  require_support(ids, out, weight, k);
  return {pointer<const float>(upstream), ids, weight, k, out};
}

inline GatherDotWeightArgs gather_dot_weight_args(uintptr_t upstream, const Rows& ids,
                                                  const Rows& hidden, int k, const Rows& out) {
  require_support(ids, hidden, out, k);
  return {pointer<const float>(upstream), ids, hidden, k, out};
}

}  // namespace opd
