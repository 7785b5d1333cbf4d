// The module _cuda: the CUDA kernels. It can be imported without a GPU.

#include "device.h"

using namespace opd;

#ifndef OPD_CUDA_ARCHS
#error "the build names the architectures that the kernels are compiled for"
#endif

namespace {

void select_divergence(const DivergenceArgs& args, const cuda::Device& device) {
  require(args.objective.is_reverse_kl(), "the fused kernel computes reverse_kl() alone");
  cuda::select_divergence(args, device);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of opd_kernels. Sizes are checked here, memory on the Python side.";
  m.attr("max_k") = kMaxK;
  m.attr("architectures") = OPD_CUDA_ARCHS;
  m.attr("runtime_version") = cuda::runtime_version();
  m.def("driver_version", &cuda::driver_version);
  m.def("shared_bytes", &cuda::shared_bytes, py::arg("index"));
  m.def("max_clusters", &cuda::max_clusters, py::arg("index"), py::arg("size"));
  m.attr("max_cluster") = cuda::kMaxCluster;
  m.def(
      "max_width",
      [](int k, const std::string& dtype) { return cuda::max_width(k, dtype_of(dtype)); },
      py::arg("k"), py::arg("dtype"));
  define_arguments(m);
  define_device(m);

  define(m, "select", select_args, cuda::select);
  define(m, "gather", gather_args, cuda::gather);
  define(m, "select_divergence", select_divergence_args, select_divergence);
  define(m, "entry_divergence", entry_divergence_args, cuda::entry_divergence);
  define(m, "full_divergence", full_divergence_args, cuda::full_divergence);
  define(m, "select_with_tail", select_with_tail_args, cuda::select_with_tail);
  define(m, "tail_logsumexp", tail_args, cuda::tail_logsumexp);
  define(m, "scatter", scatter_args, cuda::scatter);
  define(m, "scatter_background", background_args, cuda::scatter_background);
}
