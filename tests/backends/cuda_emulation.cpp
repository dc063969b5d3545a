// The CUDA kernels on the CPU: the same tile functions, one block after another, each block's threads as loops between
// barriers. Tickets run in one of two ways:
//
// - In their order. Waiting for something that is not there yet is an error, as this order is what keeps the kernels
//   from hanging.
// - In any order that the waits allow, drawn from a seed, with noise in shared memory and registers before each tile.
//   On a GPU a block may be overtaken by any number of others: what a tile reads must be what it waited for.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cuda_host_block.h"
#include "cuda_limits.h"

namespace {

// A block's shared memory, and behind it some where nothing may be written.
class Shared {
 public:
  explicit Shared(uint32_t bytes)
      : bytes_(uint32_t(round_up(bytes, 16))),
        memory_(static_cast<unsigned char*>(std::aligned_alloc(16, bytes_ + kBeyond)), &std::free) {
    std::memset(memory_.get(), 0xff, bytes_ + kBeyond);  // NaN
  }
  unsigned char* begin() { return memory_.get(); }
  void scramble(Random& random) { fill_with_noise(memory_.get(), bytes_, random); }
  bool is_intact() const {
    return std::all_of(memory_.get() + bytes_, memory_.get() + bytes_ + kBeyond, [](int x) { return x == 0xff; });
  }

 private:
  static constexpr uint32_t kBeyond = 4096;
  uint32_t bytes_;
  std::unique_ptr<unsigned char, decltype(&std::free)> memory_;
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
const Planned* write_table(const std::vector<Planned>& planned, void* workspace, int64_t at) {
  Planned* const table = reinterpret_cast<Planned*>(static_cast<unsigned char*>(workspace) + at);
  for_table_chunks(planned.data(), planned.size(), table, [](const TableChunk<Planned>& chunk) {
    for (int thread = 0; thread < 1024; ++thread) chunk.write(thread, 1024);
    return 0;
  });
  return table;
}

// Layers and segments of a call. Those of more layers than arguments hold are read from the table in the workspace,
// which is written as the GPU's is.
template <class Args, class Planned>
void set_table(Args& args, const std::vector<Planned>& planned, const std::vector<Segment>& segments, void* workspace,
               const Plan& plan) {
  const bool in_workspace = planned.size() > size_t(kMaxByValue);
  args.layers = in_workspace ? write_table(planned, workspace, plan.table_at) : planned.data();
  args.segments = in_workspace ? write_table(segments, workspace, plan.segments_at) : segments.data();
}

template <int Threads, class Call, class Process>
int in_order(const Call& call, Shared& shared, Process process) {
  for (uint32_t ticket = call.first_ticket; ticket < call.end_ticket; ++ticket) {
    HostBlock<Threads> block(shared.begin(), false);
    process(block, ticket);
    if (block.error()) return block.error();
  }
  return 0;
}

struct Pending {
  uint32_t ticket;
  Postponed until;

  bool is_ready() const { return until.counter == nullptr || *until.counter >= until.value; }
};

// Which of the pending tickets, in ascending order, to try next: by the seed any, late ones, early ones, or all sorts.
size_t choose(size_t n, Random& random) {
  const size_t any = random() % n, other = random() % n;
  switch (order_seed % 4) {
    case 0:
      return any;
    case 1:
      return n - 1;
    case 2:
      return std::min({any, other, size_t(random() % n)});
    default:
      return random() % 2 ? std::max(any, other) : 0;
  }
}

template <int Threads, class Call, class Process>
int in_any_order(const Call& call, Shared& shared, Process process) {
  Random random(order_seed);
  std::vector<Pending> pending;
  for (uint32_t ticket = call.first_ticket; ticket < call.end_ticket; ++ticket) pending.push_back({ticket, {}});
  while (!pending.empty()) {
    const size_t from = choose(pending.size(), random);
    const auto ready = [](const Pending& one) { return one.is_ready(); };
    auto chosen = std::find_if(pending.begin() + int64_t(from), pending.end(), ready);
    if (chosen == pending.end()) chosen = std::find_if(pending.begin(), pending.end(), ready);
    if (chosen == pending.end()) return kStuck;
    shared.scramble(random);
    HostBlock<Threads> block(shared.begin(), true);
    try {
      process(block, chosen->ticket);
      if (block.error()) return block.error();
      pending.erase(chosen);
    } catch (const Postponed& until) {
      chosen->until = until;
    }
  }
  return 0;
}

template <int Threads, class Call, class Process>
int work_through(const Call& call, uint32_t shared_bytes, Process process) {
  Shared shared(shared_bytes);
  const int error =
      order_seed ? in_any_order<Threads>(call, shared, process) : in_order<Threads>(call, shared, process);
  return error ? error : shared.is_intact() ? 0 : kBeyondShared;
}

}  // namespace

extern "C" {

void set_last_thread_first(bool value) { last_thread_first = value; }

void set_order(uint64_t seed) { order_seed = seed; }

int count_launches() { return launches; }

uint32_t divide(uint32_t x, int64_t by) { return divisor(by)(x); }

// Everything as in csrc/cuda/cuda.h, but for the device, given by its limits.
int64_t forward_workspace(const Geometry* geometry, int64_t n, DType weight_type, int multiprocessors, int64_t shared) {
  const std::vector<Layer> layers = layers_without_memory(geometry, n);
  std::vector<ForwardLayer> planned(layers.size());
  std::vector<Segment> segments(layers.size() * kPhases);
  ForwardCall call = {};
  call.update = true;
  const Device device = device_of(multiprocessors, shared);
  return plan_forward(layers, weight_type, device, true, call, planned.data(), segments.data()).workspace_bytes;
}

int64_t backward_workspace(const Geometry* geometry, int64_t n, int multiprocessors, int64_t shared) {
  const std::vector<Layer> layers = layers_without_memory(geometry, n);
  std::vector<BackwardLayer> planned(layers.size());
  std::vector<Segment> segments(layers.size() * kBackwardSegments);
  BackwardCall call = {};
  const Device device = device_of(multiprocessors, shared);
  return plan_backward(layers, device, true, call, planned.data(), segments.data()).workspace_bytes;
}

int forward(const Geometry* geometry, int64_t n, void* const* pointers, float* snapshot, float* sigma,
            DType weight_type, DType output_type, const bssn::Law* laws, double eps, int64_t iterations,
            void* workspace, bool one_launch, int multiprocessors, int64_t shared) {
  const std::vector<Layer> layers = forward_layers(geometry, n, pointers, snapshot, sigma, laws);
  std::vector<ForwardLayer> planned(layers.size());
  std::vector<Segment> segments(layers.size() * kPhases);
  ForwardTableArgs args = {};
  ForwardCall& call = args.call;
  call.sigmas = sigma;
  call.eps = eps;
  call.output_type = int32_t(output_type);
  call.update = iterations > 0;
  const Device device = device_of(multiprocessors, shared);
  const Plan plan = plan_forward(layers, weight_type, device, one_launch, call, planned.data(), segments.data());
  set_workspace(call, reinterpret_cast<uintptr_t>(workspace));
  set_table(args, planned, segments, workspace, plan);
  const auto reset = [&] {
    std::memset(call.counters, 0, size_t(plan.counter_bytes));
    return 0;
  };
  return launch_forward(call, plan, iterations, reset, [&] {
    ++launches;
    return with_weight_type(weight_type, [&](auto element) {
      return work_through<kThreads>(call, plan.shared_bytes, [&](auto& block, uint32_t ticket) {
        forward_ticket<decltype(element)>(block, args, ticket);
      });
    });
  });
}

int backward(const Geometry* geometry, int64_t n, void* const* pointers, float* snapshot, DType weight_type,
             DType grad_type, const bssn::Law* laws, float* grad_gains, void* workspace, bool one_launch,
             int multiprocessors, int64_t shared) {
  const std::vector<Layer> layers = backward_layers(geometry, n, pointers, snapshot, laws);
  std::vector<BackwardLayer> planned(layers.size());
  std::vector<Segment> segments(layers.size() * kBackwardSegments);
  BackwardTableArgs args = {};
  BackwardCall& call = args.call;
  call.grad_gains = grad_gains;
  call.grad_type = int32_t(grad_type);
  const Device device = device_of(multiprocessors, shared);
  const Plan plan = plan_backward(layers, device, one_launch, call, planned.data(), segments.data());
  set_workspace(call, reinterpret_cast<uintptr_t>(workspace));
  set_table(args, planned, segments, workspace, plan);
  std::memset(call.counters, 0, size_t(plan.counter_bytes));
  return launch_phases(call, plan, [&] {
    ++launches;
    return with_weight_type(weight_type, [&](auto element) {
      return work_through<kBackwardThreads>(call, plan.shared_bytes, [&](auto& block, uint32_t ticket) {
        backward_ticket<decltype(element)>(block, args, ticket);
      });
    });
  });
}
}
