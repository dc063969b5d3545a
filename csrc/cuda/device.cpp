// Questions to the CUDA runtime.
#include "cuda.h"
#include "launch.h"

#define BSSN_TEXT_OF(x) #x
#define BSSN_TEXT(x) BSSN_TEXT_OF(x)

namespace bssn::cuda {

cudaError_t query_device(int device, Device& limits) {
  int shared_bytes = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const cudaError_t second = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  limits.shared_bytes = shared_bytes;
  return second;
}

const char* error_string(int error) { return cudaGetErrorString(cudaError_t(error)); }

const char* runtime_version() {
  static_assert(CUDART_VERSION >= 12010, "kernel arguments of more than 4 KiB need CUDA 12.1");
  return BSSN_TEXT(CUDART_VERSION);
}

}  // namespace bssn::cuda
