// The extension module bssn_fast._C. Addresses and sizes are plain integers and nothing of torch is included, so that
// one build serves every version of torch. All checks of tensors are made in Python before.
#include "addresses.h"
#include "from_python.h"
// All others follow Python's headers, which define what the system's mean.
#include <cstdlib>

#include "cpu/cpu.h"
#include "cpu/parallel.h"
#ifdef BSSN_WITH_CUDA
#include "cuda/cuda.h"
#endif

namespace {

using bssn::python::entry;
namespace cpu = bssn::cpu;

int64_t cpu_workspace(const bssn::Geometry* geometry, int64_t n, bssn::DType type, int threads, bool backward) {
  return (backward ? cpu::backward_workspace : cpu::forward_workspace)(geometry, n, type, threads);
}

int set_openmp(uintptr_t gomp_parallel) {
  cpu::set_openmp(gomp_parallel);
  return cpu::ok;
}

const char* environment(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

PyMethodDef functions[] = {
    entry<environment>("environment", "An environment variable, or nothing."),
    entry("addresses", bssn::python::addresses, "Where tensors lie, as bytes."),
    entry<cpu::forward>("cpu_forward", "Normalise n layers; returns an error code."),
    entry<cpu::backward>("cpu_backward", "Gradients of the weights of n layers; returns an error code."),
    entry<cpu_workspace>("cpu_workspace", "Bytes that a call works in; for the tests."),
    entry<cpu::hash>("cpu_hash", "Hashes of n stretches of memory; returns an error code."),
    entry<set_openmp>("cpu_set_openmp", "Give the address of GOMP_parallel, or 0."),
    entry<cpu::last_level_cache>("cpu_last_level_cache", "Size of the cache in bytes, or a guess."),
    entry<cpu::instruction_set>("cpu_instruction_set", "Name of the instruction set in use."),
    entry<cpu::set_instruction_set>("cpu_set_instruction_set", "Choose one; false if it is not to be had."),
#ifdef BSSN_WITH_CUDA
    entry<bssn::cuda::forward_workspace>(
        "cuda_forward_workspace", "Bytes of device memory for a forward call; if negative, minus an error code."),
    entry<bssn::cuda::backward_workspace>(
        "cuda_backward_workspace", "Bytes of device memory for a backward call; if negative, minus an error code."),
    entry<bssn::cuda::forward>("cuda_forward", "Normalise n layers; returns an error code."),
    entry<bssn::cuda::backward>("cuda_backward", "Gradients of the weights of n layers; returns an error code."),
    entry<bssn::cuda::status>("cuda_status", "0 if the kernels can run on a device, else an error code."),
    entry<bssn::cuda::error_string>("cuda_error_string", "CUDA's own words for an error code."),
    entry<bssn::cuda::runtime_version>("cuda_runtime_version", "The CUDA runtime that this was built with."),
#endif
    {},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
