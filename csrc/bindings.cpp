// The only C++ file that knows Python: raw pointers in, nothing of torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "cpu/kernels.h"

namespace py = pybind11;
using namespace opd;

namespace {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto& isa : cpu::instruction_sets())
    if (isa.supported) names.push_back(isa.name);
  return names;
}

const cpu::RowSelectors& selectors(const std::string& name) {
  for (const auto& isa : cpu::instruction_sets())
    if (name == isa.name && isa.supported) return *isa.selectors;
  throw std::invalid_argument("this CPU or build has no instruction set '" + name + "'");
}

DType dtype_of(const std::string& name) {
  static const std::map<std::string, DType> dtypes = {{"float32", DType::kFloat32},
                                                      {"float16", DType::kFloat16},
                                                      {"bfloat16", DType::kBFloat16},
                                                      {"int32", DType::kInt32},
                                                      {"int64", DType::kInt64}};
  const auto found = dtypes.find(name);
  if (found == dtypes.end()) throw std::invalid_argument("no kernel reads dtype '" + name + "'");
  return found->second;
}

cpu::ScatterMode scatter_mode(const std::string& name) {
  if (name == "assign") return cpu::ScatterMode::kAssign;
  if (name == "clear") return cpu::ScatterMode::kClear;
  if (name == "add") return cpu::ScatterMode::kAdd;
  throw std::invalid_argument("scatter has no mode '" + name + "'");
}

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of opd_kernels. Sizes are checked here, memory on the Python side.";
  m.attr("max_k") = cpu::kMaxK;
  m.def("instruction_sets", &instruction_sets, "What this CPU can run, best first.");

  py::class_<Rows>(m, "Rows")
      .def(py::init([](uintptr_t data, const std::string& dtype, const std::vector<int64_t>& shape,
                       const std::vector<int64_t>& strides) {
             return make_rows(data, dtype_of(dtype), shape, strides);
           }),
           py::arg("data"), py::arg("dtype"), py::arg("shape"), py::arg("strides"));

  py::class_<cpu::Allowed>(m, "Allowed")
      .def(py::init([](int64_t limit, uintptr_t banned, uintptr_t mask) {
             return cpu::Allowed{limit, pointer<const uint64_t>(banned), pointer<const bool>(mask)};
           }),
           py::arg("limit"), py::arg("banned") = 0, py::arg("mask") = 0);

  py::class_<cpu::Temperature>(m, "Temperature")
      .def(py::init([](float value, uintptr_t rows) {
             return cpu::Temperature{value, pointer<const float>(rows)};
           }),
           py::arg("value"), py::arg("rows") = 0);

  m.def(
      "select",
      [](const std::string& isa, int threads, const Rows& logits, const cpu::Allowed& allowed,
         int k, uintptr_t ids, uintptr_t values) {
        const cpu::SelectArgs args{logits, allowed, k, pointer<int32_t>(ids),
                                   pointer<float>(values)};
        require(k >= 1 && k <= cpu::kMaxK, "k is outside [1, max_k]");
        require(allowed.limit <= logits.width, "the limit is beyond the logits' vocabulary");
        const auto& chosen = selectors(isa);
        py::gil_scoped_release release;
        cpu::select(args, chosen, threads);
      },
      py::kw_only(), py::arg("isa"), py::arg("threads"), py::arg("logits"), py::arg("allowed"),
      py::arg("k"), py::arg("ids"), py::arg("values"));

  m.def(
      "divergence",
      [](const std::string& isa, int threads, const Rows& student, const Rows& teacher,
         const std::optional<Rows>& ids, const cpu::Allowed& allowed, int k,
         const cpu::Temperature& temperature, const cpu::Temperature& teacher_temperature,
         uintptr_t loss, uintptr_t out_ids, uintptr_t entry_grad) {
        const cpu::DivergenceArgs args{student,
                                       teacher,
                                       ids,
                                       allowed,
                                       k,
                                       temperature,
                                       teacher_temperature,
                                       pointer<float>(loss),
                                       pointer<int32_t>(out_ids),
                                       pointer<float>(entry_grad)};
        require(k >= 1 && k <= cpu::kMaxK, "k is outside [1, max_k]");
        require(student.count == teacher.count, "student and teacher differ in rows");
        require(allowed.limit <= student.width, "the limit is beyond the student's vocabulary");
        if (ids) {
          require(ids->count == student.count && ids->width == k && teacher.width == k,
                  "the support's ids or values are not (rows, k)");
        } else {
          require(allowed.limit <= teacher.width, "the limit is beyond the teacher's vocabulary");
        }
        const auto& chosen = selectors(isa);
        py::gil_scoped_release release;
        cpu::divergence(args, chosen, threads);
      },
      py::kw_only(), py::arg("isa"), py::arg("threads"), py::arg("student"), py::arg("teacher"),
      py::arg("ids"), py::arg("allowed"), py::arg("k"), py::arg("temperature"),
      py::arg("teacher_temperature"), py::arg("loss"), py::arg("out_ids"), py::arg("entry_grad"));

  m.def(
      "scatter",
      [](int threads, const Rows& out, uintptr_t ids, uintptr_t entry_grad, uintptr_t upstream,
         int k, const std::string& mode) {
        const cpu::ScatterArgs args{
            out, pointer<const int32_t>(ids), pointer<const float>(entry_grad),
            pointer<const float>(upstream), k, scatter_mode(mode)};
        py::gil_scoped_release release;
        cpu::scatter(args, threads);
      },
      py::kw_only(), py::arg("threads"), py::arg("out"), py::arg("ids"), py::arg("entry_grad"),
      py::arg("upstream"), py::arg("k"), py::arg("mode"));
}
