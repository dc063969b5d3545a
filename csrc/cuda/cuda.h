// The CUDA backend's entry points: integers in, error codes out, nothing thrown but std::bad_alloc. Works without any
// CUDA header.
//
// Vectors, snapshots and sigma are float; weights, outputs and gradients f32, bf16 or f16; a weight has less than 2^31
// elements, is dense, and the offsets of its kernel positions are equally spaced.
#pragma once

#include "layer.h"

namespace bssn::cuda {

// 0 if the kernels can run on this device, else the error code of the reason: no driver, too old a driver, or no code
// for this architecture.
int status(int device);

// Bytes of device memory, aligned to 16, that a call needs; if negative, minus an error code.
int64_t forward_workspace(const Geometry* geometry, int64_t n, DType weight_type, Way way, int device);
int64_t backward_workspace(const Geometry* geometry, int64_t n, DType grad_type, Way way, int device);

// Normalises n layers: puts one launch for each iteration, or one for each phase, on the stream. For more
// than 176 layers small launches before them write a table of layers. `pointers`: n weights, n outputs, then each
// layer's two or four vectors, then the gains [1] of the layers that have one. iterations = 0 evaluates with the
// vectors as they are. Returns 0 or an error code.
int forward(const Geometry* geometry, int64_t n, void* const* pointers, float* snapshot, float* sigma,
            DType weight_type, DType output_type, const Law* laws, double eps, int64_t iterations, void* workspace,
            Way way, int device, void* stream);

// Gradients of the weights of n layers. `pointers`: n weights, n gradients, n outputs, n addresses of sigmas,
// then the gains [1] of the layers that have one. grad_gains: as many numbers to write, in the same order.
int backward(const Geometry* geometry, int64_t n, void* const* pointers, float* snapshot, DType weight_type,
             DType grad_type, const Law* laws, float* grad_gains, void* workspace, Way way, int device, void* stream);

// CUDA's own words for an error code.
const char* error_string(int error);

// CUDART_VERSION of the runtime that this was built with, "13000" for 13.0.
const char* runtime_version();

}  // namespace bssn::cuda
