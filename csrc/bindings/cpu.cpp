// The module _C: the CPU kernels.

#include "../cpu/kernels.h"
#include "arguments.h"

using namespace opd;

namespace {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto& isa : cpu::instruction_sets())
    if (isa.supported) names.push_back(isa.name);
  return names;
}

const cpu::KernelsByDType& kernels(const std::string& name) {
  for (const auto& isa : cpu::instruction_sets())
    if (name == isa.name && isa.supported) return *isa.kernels;
  std::string allowed;
  for (const auto& supported : instruction_sets())
    allowed += (allowed.empty() ? "" : ", ") + supported;
  throw std::invalid_argument("OPD_KERNELS_CPU_ISA is '" + name +
                              "', allowed on this CPU and build are " + allowed +
                              "; unset it for the fastest");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of opd_kernels. Sizes are checked here, memory on the Python side.";
  m.attr("max_k") = kMaxK;
  m.def("instruction_sets", &instruction_sets, "What this CPU can run, best first.");
  define_arguments(m);

  m.def(
      "select",
      [](const std::string& isa, int threads, const Rows& logits, const Allowed& allowed, int k,
         uintptr_t ids, uintptr_t values) {
        const auto args = select_args(logits, allowed, k, ids, values);
        const auto& chosen = kernels(isa);
        py::gil_scoped_release release;
        cpu::select(args, chosen, threads);
      },
      py::kw_only(), py::arg("isa"), py::arg("threads"), py::arg("logits"), py::arg("allowed"),
      py::arg("k"), py::arg("ids"), py::arg("values"));

  m.def(
      "divergence",
      [](const std::string& isa, int threads, const Rows& student, const Rows& teacher,
         const std::optional<Rows>& ids, const Allowed& allowed, int k,
         const Temperature& temperature, const Temperature& teacher_temperature, uintptr_t loss,
         uintptr_t out_ids, uintptr_t entry_grad) {
        const auto args = divergence_args(student, teacher, ids, allowed, k, temperature,
                                          teacher_temperature, loss, out_ids, entry_grad);
        const auto& chosen = kernels(isa);
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
        const auto args = scatter_args(out, ids, entry_grad, upstream, k, mode);
        py::gil_scoped_release release;
        cpu::scatter(args, threads);
      },
      py::kw_only(), py::arg("threads"), py::arg("out"), py::arg("ids"), py::arg("entry_grad"),
      py::arg("upstream"), py::arg("k"), py::arg("mode"));

  m.def(
      "gather_dot",
      [](const std::string& isa, int threads, const Rows& hidden, const Rows& weight,
         uintptr_t bias, const std::string& bias_dtype, const Rows& ids, const Allowed& allowed,
         int k, uintptr_t logits, uintptr_t slots) {
        const auto args =
            gather_dot_args(hidden, weight, bias, bias_dtype, ids, allowed, k, logits, slots);
        const auto& chosen = kernels(isa);
        py::gil_scoped_release release;
        cpu::gather_dot(args, chosen, threads);
      },
      py::kw_only(), py::arg("isa"), py::arg("threads"), py::arg("hidden"), py::arg("weight"),
      py::arg("bias"), py::arg("bias_dtype"), py::arg("ids"), py::arg("allowed"), py::arg("k"),
      py::arg("logits"), py::arg("slots"));

  m.def(
      "gather_dot_hidden",
      [](const std::string& isa, int threads, uintptr_t upstream, const Rows& ids,
         const Rows& weight, int k, const Rows& out) {
        const auto args = gather_dot_hidden_args(upstream, ids, weight, k, out);
        const auto& chosen = kernels(isa);
        py::gil_scoped_release release;
        cpu::gather_dot_hidden(args, chosen, threads);
      },
      py::kw_only(), py::arg("isa"), py::arg("threads"), py::arg("upstream"), py::arg("ids"),
      py::arg("weight"), py::arg("k"), py::arg("out"));

  m.def(
      "gather_dot_weight",
      [](const std::string& isa, int threads, uintptr_t upstream, const Rows& ids,
         const Rows& hidden, int k, const Rows& out) {
        const auto args = gather_dot_weight_args(upstream, ids, hidden, k, out);
        const auto& chosen = kernels(isa);
        py::gil_scoped_release release;
        cpu::gather_dot_weight(args, chosen, threads);
      },
      py::kw_only(), py::arg("isa"), py::arg("threads"), py::arg("upstream"), py::arg("ids"),
      py::arg("hidden"), py::arg("k"), py::arg("out"));
}
