// The CUDA kernels on the CPU: the same tile functions, one block after another, each block's threads as loops between
// barriers. Tickets run in one of two ways:
//
// - In their order. Waiting for something that is not there yet is an error, as this order is what keeps the kernels
//   from hanging.
// - In any order that the waits allow, drawn from a seed, with noise in shared memory and registers before each tile.
//   On a GPU a block may be overtaken by any number of others: what a tile reads must be what it waited for.
#include <algorithm>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <vector>

// Copies into shared memory arrive when they are waited for, not before; until then there is noise in their place.
void begin_copy(void* to, const void* from, size_t bytes);
#define BSSN_HOST_COPY(to, from, bytes) ::begin_copy(to, from, bytes)

#include "cuda/backward.h"
#include "cuda/forward.h"
#include "cuda/plan_backward.h"
#include "cuda/plan_forward.h"
#include "cuda_limits.h"

namespace {

using namespace bssn::cuda;

enum Error : int { kWaited = 1, kBadType = 2, kStuck = 3, kBeyondShared = 4, kTooSoon = 5, kOnTheWay = 6 };

// Whether a block's threads run from the last to the first.
bool last_thread_first = false;

// How many have there been.
int launches = 0;

// Of the order of tickets; 0: as they are numbered.
uint64_t order_seed = 0;

using Random = std::mt19937_64;

// Floats of any size, infinities and NaN among them.
void fill_with_noise(void* memory, size_t bytes, Random& random) {
  const uint64_t start = random(), step = random() | 1u;
  uint64_t value = start;
  for (size_t x = 0; x < bytes; x += sizeof value, value += step) {
    std::memcpy(static_cast<unsigned char*>(memory) + x, &value, std::min(sizeof value, bytes - x));
  }
}

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

// Of one thread: those it has begun, and its groups of them, as cp.async has it.
struct Copies {
  std::vector<Copy> begun;
  std::deque<std::vector<Copy>> groups;

  bool empty() const {
    return begun.empty() && std::all_of(groups.begin(), groups.end(), [](const auto& group) { return group.empty(); });
  }
};

std::vector<Copies> copies;
size_t current_thread = 0;

// A tile has to wait, and has done nothing yet.
struct Postponed {
  const uint32_t* counter;
  uint32_t value;
};

template <int Threads>
class HostBlock {
 public:
  static constexpr int kThreads = Threads;

  template <class T>
  class PerThread {
   public:
    PerThread() {
      Random random(order_seed);
      fill_with_noise(static_cast<void*>(values_.data()), Threads * sizeof(T), random);
    }
    T& operator[](int thread) { return values_[size_t(thread)]; }

   private:
    std::vector<T> values_ = std::vector<T>(Threads);
  };

  HostBlock(unsigned char* shared, bool may_wait) : shared_(shared), may_wait_(may_wait) { copies.assign(Threads, {}); }

  template <class F>
  void each(F f) {
    all(f);
    sync();
  }

  template <class F>
  void all(F f) {
    begun_ = true;
    behind_barrier_ = false;
    for (int j = 0; j < Threads; ++j) {
      const int thread = last_thread_first ? Threads - 1 - j : j;
      current_thread = size_t(thread);
      f(thread);
    }
  }

  template <class F>
  void lead(F f) {
    f();
  }

  // What it writes is written again if the tile has to wait.
  template <class F>
  void prepare(F f) {
    for (int thread = 0; thread < Threads; ++thread) f(thread);
  }

  void sync() { behind_barrier_ = true; }

  template <class T, int N, int Classes, class Get, class Out>
  void sum_lanes(Get get, Out out) {
    for (int warp = 0; warp < Threads / 32; ++warp) {
      std::vector<T> sums(N * Classes);
      for (int lane = 0; lane < 32; ++lane) {
        T x[N] = {};
        get(32 * warp + lane, x);
        for (int j = 0; j < N; ++j) sums[size_t(lane % Classes * N + j)] += x[j];
      }
      std::copy(sums.begin(), sums.end(), out(warp));
    }
  }

  template <int Rows, int Numbers, int Classes, class First, class In, class Values>
  void sum_warps(int warps, First first_warp, In in, Values values) {
    constexpr int kAll = Rows * Numbers;
    for (int thread = 0; thread < Threads; ++thread) {
      const int lane = thread % 32, first = first_warp(thread), end = std::min(first + warps, Threads / 32);
      float* const to = values(thread);
      std::fill_n(to, kAll + 1, 0.0f);
      for (int w = first; w < end; ++w) {
        for (int j = 0; j < kAll; ++j) {
          for (int c = 0; c < (j % Numbers == 0 ? Classes : 1); ++c) {
            to[j] += in(w)[(j % Numbers == 0 ? c : lane % Classes) * kAll + j];
          }
        }
        if (lane < kAll * Classes) to[kAll] += in(w)[lane];
      }
    }
  }

  template <class T>
  T* shared(uint32_t offset) {
    return reinterpret_cast<T*>(shared_ + offset);
  }

  void commit_copies() {
    Copies& mine = copies[current_thread];
    mine.groups.push_back(std::move(mine.begun));
    mine.begun.clear();
  }
  void wait_for_copies(int pending) {
    std::deque<std::vector<Copy>>& groups = copies[current_thread].groups;
    for (; groups.size() > size_t(pending); groups.pop_front()) {
      for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
  void publish(uint32_t* counter) { arrive(counter); }
  uint32_t arrive(uint32_t* counter) {
    if (!behind_barrier_) error_ = kTooSoon;
    return (*counter)++;
  }
  void wait(const uint32_t* counter, uint32_t value) {
    if (*counter >= value) return;
    if (may_wait_ && !begun_) throw Postponed{counter, value};
    error_ = kWaited;
  }
  Pack<float, 4> load_l2(const float* address) { return *reinterpret_cast<const Pack<float, 4>*>(address); }
  int error() const {
    const bool all_there = std::all_of(copies.begin(), copies.end(), [](const Copies& one) { return one.empty(); });
    return error_ || all_there ? error_ : kOnTheWay;
  }

 private:
  unsigned char* shared_;
  bool may_wait_, begun_ = false, behind_barrier_ = true;
  int error_ = 0;
};

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
  static constexpr uint32_t kBeyond = 256;
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

void begin_copy(void* to, const void* from, size_t bytes) {
  std::memset(to, 0xff, bytes);  // NaN
  copies[current_thread].begun.push_back({to, from, bytes});
}

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
