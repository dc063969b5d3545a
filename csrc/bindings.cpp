// The extension module bssn_fast._C. Addresses and sizes are plain integers and nothing of torch is included, so that
// one build serves every version of torch. All checks of tensors are made in Python before.
#include <pybind11/pybind11.h>

#include "cpu/cpu.h"
#include "cpu/parallel.h"

namespace py = pybind11;

#ifdef BSSN_WITH_CUDA
void register_cuda(py::module_& module);
#endif

PYBIND11_MODULE(_C, module) {
  using bssn::DType;
  using bssn::Geometry;
  module.def(
      "cpu_forward",
      [](uintptr_t geometry, int64_t n, uintptr_t pointers, uintptr_t snapshot, uintptr_t sigma, int64_t weight_type,
         int64_t output_type, double scale, double eps, int64_t iterations, int threads) {
        py::gil_scoped_release release;
        return bssn::cpu::forward(reinterpret_cast<const Geometry*>(geometry), n,
                                  reinterpret_cast<void* const*>(pointers), reinterpret_cast<void*>(snapshot),
                                  reinterpret_cast<void*>(sigma), DType(weight_type), DType(output_type), scale, eps,
                                  iterations, threads);
      },
      "Normalise n layers; returns an error code.");
  module.def(
      "cpu_backward",
      [](uintptr_t geometry, int64_t n, uintptr_t pointers, uintptr_t snapshot, int64_t weight_type, int64_t grad_type,
         double scale, int threads) {
        py::gil_scoped_release release;
        return bssn::cpu::backward(reinterpret_cast<const Geometry*>(geometry), n,
                                   reinterpret_cast<void* const*>(pointers), reinterpret_cast<void*>(snapshot),
                                   DType(weight_type), DType(grad_type), scale, threads);
      },
      "Gradients of the weights of n layers; returns an error code.");
  module.def(
      "cpu_workspace",
      [](uintptr_t geometry, int64_t n, int64_t weight_type, int threads, bool backward) {
        const auto* layers = reinterpret_cast<const Geometry*>(geometry);
        return backward ? bssn::cpu::backward_workspace(layers, n, DType(weight_type), threads)
                        : bssn::cpu::forward_workspace(layers, n, DType(weight_type), threads);
      },
      "Bytes that a call works in; for the tests.");
  module.def(
      "cpu_hash",
      [](uintptr_t addresses, uintptr_t sizes, int64_t n, int threads, uintptr_t out) {
        py::gil_scoped_release release;
        return bssn::cpu::hash(reinterpret_cast<const int64_t*>(addresses), reinterpret_cast<const int64_t*>(sizes), n,
                               threads, reinterpret_cast<uint64_t*>(out));
      },
      "Hashes of n stretches of memory; returns an error code.");
  module.def("cpu_set_openmp", &bssn::cpu::set_openmp, "Give the address of GOMP_parallel, or 0.");
  module.def("cpu_last_level_cache", &bssn::cpu::last_level_cache, "Size of the cache in bytes, or a guess.");
  module.def("cpu_instruction_set", &bssn::cpu::instruction_set, "Name of the instruction set in use.");
  module.def("cpu_set_instruction_set", &bssn::cpu::set_instruction_set, "Choose one; false if it is not to be had.");
#ifdef BSSN_WITH_CUDA
  register_cuda(module);
#endif
}
