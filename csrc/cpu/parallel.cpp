#include "parallel.h"

#include <exception>
#include <thread>
#include <vector>

#ifdef __unix__
#include <unistd.h>
#endif

namespace bssn::cpu {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
GompParallel gomp_parallel = nullptr;

#ifdef __unix__
const pid_t first_process = getpid();
bool forked() { return getpid() != first_process; }
#else
bool forked() { return false; }
#endif

}  // namespace

void set_openmp(uintptr_t address) { gomp_parallel = reinterpret_cast<GompParallel>(address); }

void run_parallel(int threads, void (*body)(void*), void* data) {
  if (threads <= 1 || forked()) {
    body(data);
    return;
  }
  if (gomp_parallel != nullptr) {
    gomp_parallel(body, data, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> workers;
  workers.reserve(size_t(threads));
  try {
    for (int i = 1; i < threads; ++i) workers.emplace_back(body, data);
  } catch (const std::exception&) {
    // No more threads to be had, or no memory for them: those that there are do all the work.
  }
  body(data);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace bssn::cpu
