// The CPU backend's entry points: integers in, error codes out, nothing thrown.
#pragma once

#include "../layer.h"

namespace bssn::cpu {

enum Error : int { ok = 0, out_of_memory = 1 };

// Normalises n layers. The compute type T is double if weight_type is f64, else float: vectors, snapshot and sigma [n]
// are of that type. pointers: n weights, n outputs or nulls, then each layer's two or four vectors, then the gains [1]
// of the layers that have one. iterations = 0 evaluates with the vectors as they are. The result does not depend on
// `threads`.
int forward(const Geometry* geometry, int64_t n, void* const* pointers, void* snapshot, void* sigma, DType weight_type,
            DType output_type, const Law* laws, double eps, int64_t iterations, int threads);

// Gradients of the weights of n layers of one forward. pointers: n weights, n gradients, n outputs, n addresses of
// sigma, then the gains [1] of the layers that have one. grad_gains: as many numbers to write, in the same order.
int backward(const Geometry* geometry, int64_t n, void* const* pointers, void* snapshot, DType weight_type,
             DType grad_type, const Law* laws, void* grad_gains, int threads);

// Bytes that the two need to work in, beside what they are given. Each thread's share is bounded.
int64_t forward_workspace(const Geometry* geometry, int64_t n, DType weight_type, int threads);
int64_t backward_workspace(const Geometry* geometry, int64_t n, DType weight_type, int threads);

// One hash for each of n stretches of memory, over all their bytes: sizes [n] in bytes, out [n]. A single changed
// number is seen for certain. The result depends neither on `threads` nor on the instruction set.
int hash(const int64_t* addresses, const int64_t* sizes, int64_t n, int threads, uint64_t* out);

// Its size in bytes, or a guess. Calls that read and write more than that write past the caches.
int64_t last_level_cache();

// Best instruction set of this processor among those built, or the one chosen by set_instruction_set.
const char* instruction_set();

// Chooses "portable", "avx2" or "avx512"; false if this build or processor does not have it. Used by the tests.
bool set_instruction_set(const char* name);

}  // namespace bssn::cpu
