// Arguments that both compiled modules take from Python: addresses and dtypes by name, no torch.
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
  py::class_<Rows>(m, "Rows", py::module_local())
      .def(py::init([](uintptr_t data, const std::string& dtype, const std::vector<int64_t>& shape,
                       const std::vector<int64_t>& strides) {
             return make_rows(data, dtype_of(dtype), shape, strides);
           }),
           py::arg("data"), py::arg("dtype"), py::arg("shape"), py::arg("strides"));

  py::class_<Allowed>(m, "Allowed", py::module_local())
      .def(py::init([](int64_t limit, uintptr_t banned, uintptr_t mask) {
             return Allowed{limit, pointer<const uint64_t>(banned), pointer<const bool>(mask)};
           }),
           py::arg("limit"), py::arg("banned") = 0, py::arg("mask") = 0);

  py::class_<Temperature>(m, "Temperature", py::module_local())
      .def(py::init([](float value, uintptr_t rows) {
             return Temperature{value, pointer<const float>(rows)};
           }),
           py::arg("value"), py::arg("rows") = 0);
}

inline SelectArgs select_args(const Rows& logits, const Allowed& allowed, int k, uintptr_t ids,
                              uintptr_t values) {
  require(k >= 1 && k <= kMaxK, "k is outside [1, max_k]");
  require(is_floating(logits), "the logits are integers");
  require(allowed.limit <= logits.width, "the limit is beyond the logits' vocabulary");
  return {logits, allowed, k, pointer<int32_t>(ids), pointer<float>(values)};
}

inline DivergenceArgs divergence_args(const Rows& student, const Rows& teacher,
                                      const std::optional<Rows>& ids, const Allowed& allowed, int k,
                                      const Temperature& temperature,
                                      const Temperature& teacher_temperature, uintptr_t loss,
                                      uintptr_t out_ids, uintptr_t entry_grad) {
  require(k >= 1 && k <= kMaxK, "k is outside [1, max_k]");
  require(student.count == teacher.count, "student and teacher differ in rows");
  require(is_floating(student) && is_floating(teacher), "student or teacher are integers");
  require(!ids || !is_floating(*ids), "the support's ids are no integers");
  require(allowed.limit <= student.width, "the limit is beyond the student's vocabulary");
  if (ids) {
    require(ids->count == student.count && ids->width == k && teacher.width == k,
            "the support's ids or values are not (rows, k)");
  } else {
    require(allowed.limit <= teacher.width, "the limit is beyond the teacher's vocabulary");
  }
  return {student,
          teacher,
          ids.value_or(Rows{}),
          ids.has_value(),
          allowed,
          k,
          temperature,
          teacher_temperature,
          pointer<float>(loss),
          pointer<int32_t>(out_ids),
          pointer<float>(entry_grad)};
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
