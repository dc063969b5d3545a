// The host's side of the CUDA kernels against a runtime that only takes notes: which device was current, which stream
// was given. Two GPUs; a call that is asked to can fail.
#include <cstring>
#include <vector>

#include "cuda/cuda.h"
#include "cuda/kernels.h"
#include "cuda_runtime_api.h"

namespace {

constexpr int kDevices = 2;
int current = 0;
cudaError_t last_error = cudaSuccess;
int calls_until_failure = -1;

struct Note {
  int64_t device, stream;
};
std::vector<Note> notes;

cudaError_t note(cudaStream_t stream) {
  notes.push_back({current, int64_t(reinterpret_cast<uintptr_t>(stream))});
  return calls_until_failure >= 0 && calls_until_failure-- == 0 ? cudaError_t(700) : cudaSuccess;
}

unsigned blocks = 0, cluster = 0, shared = 0;  // of the last launch

const char kernel = 0;

}  // namespace

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  current = device;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t) { return "words"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  *value = attribute == cudaDevAttrMultiProcessorCount ? 132 : 227 * 1024;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t stream) { return note(stream); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  blocks = config->gridDim.x;
  shared = unsigned(config->dynamicSmemBytes);
  cluster = config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1;
  return note(config->stream);
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) { return note(stream); }

namespace bssn::cuda {

Kernels forward_kernels_f32() { return {&kernel, &kernel, &kernel}; }
Kernels forward_kernels_bf16() { return {&kernel, &kernel, &kernel}; }
Kernels forward_kernels_f16() { return {&kernel, &kernel, &kernel}; }
Kernels backward_kernels(DType) { return {&kernel, &kernel, &kernel}; }
const void* table_kernel(const ForwardLayer*) { return &kernel; }
const void* table_kernel(const BackwardLayer*) { return &kernel; }
const void* table_kernel(const Segment*) { return &kernel; }

}  // namespace bssn::cuda

extern "C" {

void reset(int device, int error, int calls) {
  current = device;
  last_error = cudaError_t(error);
  calls_until_failure = calls;
  notes.clear();
}

int current_device() { return current; }

// Two numbers for each launch and fill: device and stream. Returns how many there were.
int notes_into(int64_t* out, int capacity) {
  std::memcpy(out, notes.data(), sizeof(Note) * size_t(int(notes.size()) < capacity ? int(notes.size()) : capacity));
  return int(notes.size());
}

// With pointers to nothing, as nothing runs.
int forward(const bssn::cuda::Geometry* geometry, int64_t n, int device, void* stream, int64_t way) {
  const std::vector<void*> pointers(size_t(6 * n));
  const std::vector<bssn::Law> laws(size_t(n), {1.0, bssn::LawKind::constant});
  return bssn::cuda::forward(geometry, n, pointers.data(), nullptr, nullptr, bssn::cuda::DType::f32,
                             bssn::cuda::DType::f32, laws.data(), 1e-12, 1, nullptr, bssn::cuda::Way(way), device,
                             stream);
}

int backward(const bssn::cuda::Geometry* geometry, int64_t n, int device, void* stream, int64_t way) {
  const std::vector<void*> pointers(size_t(4 * n));
  const std::vector<bssn::Law> laws(size_t(n), {1.0, bssn::LawKind::constant});
  return bssn::cuda::backward(geometry, n, pointers.data(), nullptr, bssn::cuda::DType::f32, bssn::cuda::DType::f32,
                              laws.data(), nullptr, nullptr, bssn::cuda::Way(way), device, stream);
}

// Blocks of the last launch, of a cluster in it, and a block's bytes of shared memory.
unsigned launched_blocks() { return blocks; }
unsigned launched_cluster() { return cluster; }
unsigned launched_shared() { return shared; }

int status(int device) { return bssn::cuda::status(device); }

int64_t forward_workspace(const bssn::cuda::Geometry* geometry, int64_t n, int device) {
  return bssn::cuda::forward_workspace(geometry, n, bssn::cuda::DType::f32, bssn::cuda::Way::tiles, device);
}
}
