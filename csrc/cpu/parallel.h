// Threads for one call.
#pragma once

#include <cstdint>

namespace bssn::cpu {

// Address of GOMP_parallel in the OpenMP runtime that torch has already loaded: its worker threads are then used, as
// a second pool would compete with them for the cores. Without it (0) every call starts threads of its own.
void set_openmp(uintptr_t gomp_parallel);

// Calls body(data) on up to `threads` threads at once and waits for all of them. In a forked child, where the runtime's
// threads do not exist, only the calling thread runs it.
void run_parallel(int threads, void (*body)(void*), void* data);

}  // namespace bssn::cpu
