// The CUDA kernels on the CPU: the same tile functions, one block after another in the order of their tickets, each
// block's threads as loops between barriers. Waiting for something that is not there yet is an error, as the order of
// the tickets is what keeps the kernels from hanging.
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda/backward.h"
#include "cuda/forward.h"
#include "cuda/plan_backward.h"
#include "cuda/plan_forward.h"

namespace {

using namespace bssn::cuda;

enum Error : int { kWaited = 1, kBadType = 2 };

// Whether a block's threads run from the last to the first.
bool last_thread_first = false;

// How many have there been.
int launches = 0;

template <int Threads>
class HostBlock {
 public:
  static constexpr int kThreads = Threads;

  template <class T>
  class PerThread {
   public:
    T& operator[](int thread) { return values_[size_t(thread)]; }

   private:
    std::vector<T> values_ = std::vector<T>(Threads);
  };

  explicit HostBlock(unsigned char* shared) : shared_(shared) {}

  template <class F>
  void each(F f) {
    for (int thread = 0; thread < Threads; ++thread) f(last_thread_first ? Threads - 1 - thread : thread);
  }

  template <class T>
  T* shared(uint32_t offset) {
    return reinterpret_cast<T*>(shared_ + offset);
  }

  void commit_copies() {}
  void wait_for_copies(int) {}
  void publish(uint32_t* counter) { ++*counter; }
  uint32_t arrive(uint32_t* counter) { return (*counter)++; }
  void wait(const uint32_t* counter, uint32_t value) { failed_ |= *counter < value; }
  Pack<float, 4> load_l2(const float* address) { return *reinterpret_cast<const Pack<float, 4>*>(address); }
  bool failed() const { return failed_; }

 private:
  unsigned char* shared_;
  bool failed_ = false;
};

struct Shared {
  explicit Shared(uint32_t bytes) : memory(static_cast<unsigned char*>(std::aligned_alloc(16, bytes)), &std::free) {
    std::memset(memory.get(), 0xff, bytes);  // NaN
  }
  std::unique_ptr<unsigned char, decltype(&std::free)> memory;
};

// Calls f with a zero of the weights' element type.
template <class F>
int with_weight_type(DType type, F f) {
  switch (type) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(BFloat16{});
    case DType::f16:
      return f(Float16{});
    default:
      return kBadType;
  }
}

template <class Planned>
const Planned* write_table(const std::vector<Planned>& planned, void* workspace, const Plan& plan) {
  Planned* const table = reinterpret_cast<Planned*>(static_cast<unsigned char*>(workspace) + plan.table_at);
  for_table_chunks(planned.data(), planned.size(), table, [](const TableChunk<Planned>& chunk) {
    for (int thread = 0; thread < 1024; ++thread) chunk.write(thread, 1024);
    return 0;
  });
  return table;
}

template <int Threads, class Call, class Process>
int work_through(const Call& call, uint32_t shared_bytes, Process process) {
  Shared shared(uint32_t(round_up(shared_bytes, 16)));
  for (uint32_t ticket = call.first_ticket; ticket < call.end_ticket; ++ticket) {
    HostBlock<Threads> block(shared.memory.get());
    process(block, ticket);
    if (block.failed()) return kWaited;
  }
  return 0;
}

// Turing's code is the one for 64 KiB of shared memory.
Device device_of(int multiprocessors, int64_t shared) {
  return {multiprocessors, shared, columns_of_code(shared <= 64 * 1024 ? 75 : 80)};
}

}  // namespace

extern "C" {

void set_last_thread_first(bool value) { last_thread_first = value; }

int count_launches() { return launches; }

uint32_t divide(uint32_t x, int64_t by) { return divisor(by)(x); }

// Of each layer of a forward call: power tiles, their channels, bytes of a step in shared memory (0: the
// rows are read from global memory), steps in shared memory at a time, threads that share a row.
void plan_of(const Geometry* geometry, int n, DType weight_type, int multiprocessors, int64_t shared, int64_t* out) {
  std::vector<Layer> layers;
  for (int j = 0; j < n; ++j) {
    layers.push_back(with_geometry(geometry[j]));
    layers.back().weight = reinterpret_cast<const void*>(uintptr_t(j) * 256);  // to know it again: the plan is sorted
  }
  ForwardCall call = {};
  std::vector<ForwardLayer> planned(layers.size());
  call.update = true;
  plan_forward(layers, weight_type, device_of(multiprocessors, shared), call, planned.data());
  for (const ForwardLayer& layer : planned) {
    int64_t* const to = out + 5 * (reinterpret_cast<uintptr_t>(layer.weight) / 256);
    to[0] = layer.tiles[power];
    to[1] = layer.channels;
    to[2] = layer.stage_bytes;
    to[3] = layer.stages;
    to[4] = layer.group_threads();
  }
}

// Everything as in csrc/cuda/cuda.h, but for the device, given by its limits.
int64_t forward_workspace(const Geometry* geometry, int64_t n, DType weight_type, int multiprocessors, int64_t shared) {
  const std::vector<Layer> layers = layers_without_memory(geometry, n);
  std::vector<ForwardLayer> planned(layers.size());
  ForwardCall call = {};
  call.update = true;
  return plan_forward(layers, weight_type, device_of(multiprocessors, shared), call, planned.data()).workspace_bytes;
}

int64_t backward_workspace(const Geometry* geometry, int64_t n, int multiprocessors, int64_t shared) {
  const std::vector<Layer> layers = layers_without_memory(geometry, n);
  std::vector<BackwardLayer> planned(layers.size());
  BackwardCall call = {};
  return plan_backward(layers, device_of(multiprocessors, shared), call, planned.data()).workspace_bytes;
}

// More layers than arguments hold are read from the table in the workspace, which is written as the GPU's is.
int forward(const Geometry* geometry, int64_t n, void* const* pointers, float* snapshot, float* sigma,
            DType weight_type, DType output_type, double scale, double eps, int64_t iterations, void* workspace,
            bool one_launch, int multiprocessors, int64_t shared) {
  const std::vector<Layer> layers = forward_layers(geometry, n, pointers, snapshot, sigma);
  std::vector<ForwardLayer> planned(layers.size());
  ForwardTableArgs args = {};
  ForwardCall& call = args.call;
  call.scale = scale;
  call.eps = eps;
  call.output_type = int32_t(output_type);
  call.update = iterations > 0;
  const Plan plan = plan_forward(layers, weight_type, device_of(multiprocessors, shared), call, planned.data());
  set_workspace(call, reinterpret_cast<uintptr_t>(workspace));
  args.layers = n > kMaxByValue ? write_table<ForwardLayer>(planned, workspace, plan) : planned.data();
  const auto reset = [&] {
    std::memset(call.counters, 0, size_t(plan.counter_bytes));
    return 0;
  };
  return launch_forward(call, iterations, one_launch, reset, [&] {
    ++launches;
    return with_weight_type(weight_type, [&](auto element) {
      return work_through<kThreads>(call, plan.shared_bytes, [&](auto& block, uint32_t ticket) {
        forward_ticket<decltype(element)>(block, args, ticket);
      });
    });
  });
}

int backward(const Geometry* geometry, int64_t n, void* const* pointers, float* snapshot, DType weight_type,
             DType grad_type, double scale, void* workspace, bool one_launch, int multiprocessors, int64_t shared) {
  const std::vector<Layer> layers = backward_layers(geometry, n, pointers, snapshot);
  std::vector<BackwardLayer> planned(layers.size());
  BackwardTableArgs args = {};
  BackwardCall& call = args.call;
  call.scale = scale;
  call.grad_type = int32_t(grad_type);
  const Plan plan = plan_backward(layers, device_of(multiprocessors, shared), call, planned.data());
  set_workspace(call, reinterpret_cast<uintptr_t>(workspace));
  args.layers = n > kMaxByValue ? write_table<BackwardLayer>(planned, workspace, plan) : planned.data();
  std::memset(call.counters, 0, size_t(plan.counter_bytes));
  return launch_phases(call, kBackwardPhases, one_launch, [&] {
    ++launches;
    return with_weight_type(weight_type, [&](auto element) {
      return work_through<kBackwardThreads>(call, plan.shared_bytes, [&](auto& block, uint32_t ticket) {
        backward_ticket<decltype(element)>(block, args, ticket);
      });
    });
  });
}
}
