// The CUDA backend's entry points: integers in, error codes out, nothing thrown. Works without any CUDA header.
//
// Vectors, snapshots and sigma are float; weights, outputs and gradients f32, bf16 or f16; a weight has less than 2^31
// elements, is dense, and the offsets of its kernel positions are equally spaced. At most max_layers() layers a call.
#pragma once

#include "../layer.h"

namespace bssn::cuda {

int max_layers();

// Bytes of device memory, aligned to 16, that a call needs; if negative, minus an error code.
int64_t forward_workspace(const Layer* layers, int64_t n, DType weight_type, int device);
int64_t backward_workspace(const Layer* layers, int64_t n, int device);

// Normalises n layers: puts one launch for each iteration (one_launch), or one for each phase, on the stream.
// iterations = 0 evaluates with the vectors as they are. Returns 0 or an error code.
int forward(const Layer* layers, int64_t n, DType weight_type, DType output_type, double scale, double eps,
            int64_t iterations, uintptr_t workspace, bool one_launch, int device, uintptr_t stream);

// Gradients of the weights of n layers; layer.vectors and layer.sigma are those that the forward wrote.
int backward(const Layer* layers, int64_t n, DType weight_type, DType grad_type, double scale, uintptr_t workspace,
             bool one_launch, int device, uintptr_t stream);

// CUDA's own words for an error code.
const char* error_string(int error);

// "13.0": the runtime that this was built with.
const char* runtime_version();

}  // namespace bssn::cuda
