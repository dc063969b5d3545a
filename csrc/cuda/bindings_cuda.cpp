// The CUDA backend's part of the extension module.
#include <pybind11/pybind11.h>

#include "cuda.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void register_cuda(py::module_& module) {
  using bssn::cuda::DType;
  using bssn::cuda::Geometry;
  module.def(
      "cuda_forward_workspace",
      [](uintptr_t geometry, int64_t n, int64_t weight_type, int device) {
        return bssn::cuda::forward_workspace(pointer<const Geometry>(geometry), n, DType(weight_type), device);
      },
      "Bytes of device memory that a forward call needs; if negative, minus an error code.");
  module.def(
      "cuda_backward_workspace",
      [](uintptr_t geometry, int64_t n, int device) {
        return bssn::cuda::backward_workspace(pointer<const Geometry>(geometry), n, device);
      },
      "Bytes of device memory that a backward call needs; if negative, minus an error code.");
  module.def(
      "cuda_forward",
      [](uintptr_t geometry, int64_t n, uintptr_t pointers, uintptr_t snapshot, uintptr_t sigma, int64_t weight_type,
         int64_t output_type, double scale, double eps, int64_t iterations, uintptr_t workspace, bool one_launch,
         int device, uintptr_t stream) {
        py::gil_scoped_release release;
        return bssn::cuda::forward(pointer<const Geometry>(geometry), n, pointer<void* const>(pointers),
                                   pointer<float>(snapshot), pointer<float>(sigma), DType(weight_type),
                                   DType(output_type), scale, eps, iterations, pointer<void>(workspace), one_launch,
                                   device, pointer<void>(stream));
      },
      "Normalise n layers; returns an error code.");
  module.def(
      "cuda_backward",
      [](uintptr_t geometry, int64_t n, uintptr_t pointers, uintptr_t snapshot, int64_t weight_type, int64_t grad_type,
         double scale, uintptr_t workspace, bool one_launch, int device, uintptr_t stream) {
        py::gil_scoped_release release;
        return bssn::cuda::backward(pointer<const Geometry>(geometry), n, pointer<void* const>(pointers),
                                    pointer<float>(snapshot), DType(weight_type), DType(grad_type), scale,
                                    pointer<void>(workspace), one_launch, device, pointer<void>(stream));
      },
      "Gradients of the weights of n layers; returns an error code.");
  module.def("cuda_status", &bssn::cuda::status, "0 if the kernels can run on a device, else an error code.");
  module.def("cuda_error_string", &bssn::cuda::error_string, "CUDA's own words for an error code.");
  module.def("cuda_runtime_version", &bssn::cuda::runtime_version, "The CUDA runtime that this was built with.");
}
