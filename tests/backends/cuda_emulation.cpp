// The CUDA kernels on the CPU: the same tile functions, one block after another, each block's threads as loops between
// barriers. Tiles' tickets run in one of two ways:
//
// - In their order. Waiting for something that is not there yet is an error, as this order is what keeps the kernels
//   from hanging.
// - In any order that the waits allow, drawn from a seed, with noise in shared memory and registers before each tile.
//   On a GPU a block may be overtaken by any number of others: what a tile reads must be what it waited for.
//
// Where a block keeps something from tile to tile, or a cluster meets at its barrier, whole blocks run: a single one
// (or cluster) which then must never wait in vain, or several, and who goes on whenever one could is drawn from the
// seed.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cuda_host_block.h"
#include "cuda_limits.h"

namespace {

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

// As many blocks of a launch as the seed says, `most` at most, in whole clusters. kept_at: where in shared memory what
// a block keeps begins.
template <int Threads, class Run>
int run_blocks(int most, int cluster, uint32_t shared_bytes, uint32_t kept_at, Run run) {
  most = std::max(std::min(most, 24) / cluster, 1);
  Random random(order_seed);
  const int blocks = cluster * (order_seed ? int(random() % uint64_t(most)) + 1 : 1);
  Launch launch(blocks, cluster, shared_bytes, kept_at, order_seed);
  int error = 0;
  const bool ends = launch.machine.run([&](int number) {
    HostBlock<Threads> block(launch, number);
    run(block);
    if (!error) error = block.error();
  });
  if (error) return error;
  if (!ends) return kStuck;
  const bool intact =
      std::all_of(launch.shared.begin(), launch.shared.end(), [](auto& one) { return one.is_intact(); });
  return intact ? 0 : kBeyondShared;
}

}  // namespace

extern "C" {

void set_last_thread_first(bool value) { last_thread_first = value; }

void set_order(uint64_t seed) { order_seed = seed; }

int count_launches() { return launches; }

int count_claims(int before, int after) { return claims_met[size_t(before)][size_t(after)]; }

uint32_t divide(uint32_t x, int64_t by) { return divisor(by)(x); }

// Everything as in csrc/cuda/cuda.h, but for the device, given by its limits.
int64_t forward_workspace(const Geometry* geometry, int64_t n, DType weight_type, Way way, int multiprocessors,
                          int64_t shared) {
  return forward_workspace_bytes(geometry, n, weight_type, device_of(multiprocessors, shared), way);
}

int64_t backward_workspace(const Geometry* geometry, int64_t n, DType grad_type, Way way, int multiprocessors,
                           int64_t shared) {
  return backward_workspace_bytes(geometry, n, grad_type, device_of(multiprocessors, shared), way);
}

int forward(const Geometry* geometry, int64_t n, void* const* pointers, float* snapshot, float* sigma,
            DType weight_type, DType output_type, const bssn::Law* laws, double eps, int64_t iterations,
            void* workspace, Way way, int multiprocessors, int64_t shared) {
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
  const Plan plan = plan_forward(layers, weight_type, device, way, call, planned.data(), segments.data());
  set_workspace(call, reinterpret_cast<uintptr_t>(workspace));
  set_table(args, planned, segments, workspace, plan);
  const auto reset = [&] {
    std::memset(call.counters, 0, size_t(plan.counter_bytes));
    return 0;
  };
  return launch_forward(call, plan, iterations, reset, [&] {
    ++launches;
    return with_weight_type(weight_type, [&](auto element) {
      if (way_on(device, way) == Way::keep || call.whole_layers > 0) {
        return run_blocks<kThreads>(multiprocessors * kForwardBlocks, call.whole_layers > 0 ? kCluster : 1,
                                    plan.shared_bytes, kAreaAt,
                                    [&](auto& block) { run_block<decltype(element)>(block, args); });
      }
      return work_through<kThreads>(call, plan.shared_bytes, [&](auto& block, uint32_t ticket) {
        forward_ticket<decltype(element)>(block, args, ticket);
      });
    });
  });
}

int backward(const Geometry* geometry, int64_t n, void* const* pointers, float* snapshot, DType weight_type,
             DType grad_type, const bssn::Law* laws, float* grad_gains, void* workspace, Way way, int multiprocessors,
             int64_t shared) {
  const std::vector<Layer> layers = backward_layers(geometry, n, pointers, snapshot, laws);
  std::vector<BackwardLayer> planned(layers.size());
  std::vector<Segment> segments(layers.size() * kBackwardSegments);
  BackwardTableArgs args = {};
  BackwardCall& call = args.call;
  call.grad_gains = grad_gains;
  const Device device = device_of(multiprocessors, shared);
  const Plan plan = plan_backward(layers, grad_type, device, way, call, planned.data(), segments.data());
  set_workspace(call, reinterpret_cast<uintptr_t>(workspace));
  set_table(args, planned, segments, workspace, plan);
  std::memset(call.counters, 0, size_t(plan.counter_bytes));
  return launch_phases(call, plan, [&] {
    ++launches;
    return with_weight_type(weight_type, [&](auto element) {
      if (way == Way::keep) {
        return run_blocks<kBackwardThreads>(multiprocessors * kBackwardBlocks, 1, plan.shared_bytes, kBackwardShared,
                                            [&](auto& block) { run_backward_block<decltype(element)>(block, args); });
      }
      return work_through<kBackwardThreads>(call, plan.shared_bytes, [&](auto& block, uint32_t ticket) {
        const Segment segment = segment_of(args.segments, call.n_segments, ticket);
        backward_tile<decltype(element)>(block, args, segment, ticket - segment.first, {0, 0, 0});
      });
    });
  });
}
}
