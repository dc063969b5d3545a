// The CUDA backend's part of the extension module.
#include <pybind11/pybind11.h>

#include "cuda.h"

namespace py = pybind11;

void register_cuda(py::module_& module) {
  using bssn::DType;
  using bssn::Layer;
  const auto table = [](uintptr_t address) { return reinterpret_cast<const Layer*>(address); };
  module.attr("CUDA_MAX_LAYERS") = bssn::cuda::max_layers();
  module.def(
      "cuda_forward_workspace",
      [=](uintptr_t layers, int64_t n, int64_t weight_type, int device) {
        return bssn::cuda::forward_workspace(table(layers), n, DType(weight_type), device);
      },
      "Bytes of device memory that a forward call needs; if negative, minus an error code.");
  module.def(
      "cuda_backward_workspace",
      [=](uintptr_t layers, int64_t n, int device) { return bssn::cuda::backward_workspace(table(layers), n, device); },
      "Bytes of device memory that a backward call needs; if negative, minus an error code.");
  module.def(
      "cuda_forward",
      [=](uintptr_t layers, int64_t n, int64_t weight_type, int64_t output_type, double scale, double eps,
          int64_t iterations, uintptr_t workspace, bool one_launch, int device, uintptr_t stream) {
        py::gil_scoped_release release;
        return bssn::cuda::forward(table(layers), n, DType(weight_type), DType(output_type), scale, eps, iterations,
                                   workspace, one_launch, device, stream);
      },
      "Normalise the n layers of a table; returns an error code.");
  module.def(
      "cuda_backward",
      [=](uintptr_t layers, int64_t n, int64_t weight_type, int64_t grad_type, double scale, uintptr_t workspace,
          bool one_launch, int device, uintptr_t stream) {
        py::gil_scoped_release release;
        return bssn::cuda::backward(table(layers), n, DType(weight_type), DType(grad_type), scale, workspace,
                                    one_launch, device, stream);
      },
      "Gradients of the weights of the n layers of a table; returns an error code.");
  module.def("cuda_error_string", &bssn::cuda::error_string, "CUDA's own words for an error code.");
  module.def("cuda_runtime_version", &bssn::cuda::runtime_version, "The CUDA runtime that this was built with.");
}
