// The module _cuda: the CUDA kernels. It can be imported without a GPU.

#include "device.h"

using namespace opd;

#ifndef OPD_CUDA_ARCHS
#error "the build names the architectures that the kernels are compiled for"
#endif

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

  m.def(
      "select",
      [](const cuda::Device& device, const Rows& logits, const Allowed& allowed, int k,
         uintptr_t ids, uintptr_t values) {
        const auto args = select_args(logits, allowed, k, ids, values);
        py::gil_scoped_release release;
        cuda::select(args, device);
      },
      py::kw_only(), py::arg("device"), py::arg("logits"), py::arg("allowed"), py::arg("k"),
      py::arg("ids"), py::arg("values"));

  m.def(
      "divergence",
      [](const cuda::Device& device, const Rows& student, const Rows& teacher,
         const std::optional<Rows>& ids, const Allowed& allowed, int k,
         const Temperature& temperature, const Temperature& teacher_temperature, uintptr_t loss,
         uintptr_t out_ids, uintptr_t entry_grad) {
        const auto args = divergence_args(student, teacher, ids, allowed, k, temperature,
                                          teacher_temperature, loss, out_ids, entry_grad);
        py::gil_scoped_release release;
        cuda::divergence(args, device);
      },
      py::kw_only(), py::arg("device"), py::arg("student"), py::arg("teacher"), py::arg("ids"),
      py::arg("allowed"), py::arg("k"), py::arg("temperature"), py::arg("teacher_temperature"),
      py::arg("loss"), py::arg("out_ids"), py::arg("entry_grad"));

  m.def(
      "scatter",
      [](const cuda::Device& device, const Rows& out, uintptr_t ids, uintptr_t entry_grad,
         uintptr_t upstream, int k, const std::string& mode) {
        const auto args = scatter_args(out, ids, entry_grad, upstream, k, mode);
        py::gil_scoped_release release;
        cuda::scatter(args, device);
      },
      py::kw_only(), py::arg("device"), py::arg("out"), py::arg("ids"), py::arg("entry_grad"),
      py::arg("upstream"), py::arg("k"), py::arg("mode"));
}
