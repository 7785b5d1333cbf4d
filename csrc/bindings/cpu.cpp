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
  py::class_<cpu::Processor>(m, "Processor", py::module_local(), "(instruction set, threads)")
      .def(py::init([](const std::string& isa, int threads) {
        return cpu::Processor{&kernels(isa), threads};
      }));

  define(m, "select", select_args, cpu::select);
  define(m, "gather", gather_args, cpu::gather);
  define(m, "select_divergence", select_divergence_args, cpu::select_divergence);
  define(m, "entry_divergence", entry_divergence_args, cpu::entry_divergence);
  define(m, "select_with_tail", select_with_tail_args, cpu::select_with_tail);
  define(m, "tail_logsumexp", tail_args, cpu::tail_logsumexp);
  define(m, "full_divergence", full_divergence_args, cpu::full_divergence);
  define(m, "scatter", scatter_args, cpu::scatter);
  define(m, "scatter_background", background_args, cpu::scatter_background);
  define(m, "gather_dot", gather_dot_args, cpu::gather_dot);
  define(m, "gather_dot_hidden", gather_dot_hidden_args, cpu::gather_dot_hidden);
  define(m, "gather_dot_weight", gather_dot_weight_args, cpu::gather_dot_weight);
}
