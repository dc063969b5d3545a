// A block of GPU threads on the CPU: its threads are loops between barriers. It brings the kernels along, as these must
// know before how copies are made.
#pragma once

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <utility>
#include <vector>

// Copies into shared memory arrive when they are waited for, not before; until then there is noise in their place.
inline void begin_copy(void* to, const void* from, size_t bytes);
#define BSSN_HOST_COPY(to, from, bytes) ::begin_copy(to, from, bytes)

#include "cuda/backward.h"
#include "cuda/forward.h"
#include "cuda/plan_backward.h"
#include "cuda/plan_forward.h"
#include "cuda_host_machine.h"

namespace {

using namespace bssn::cuda;

enum Error : int {
  kWaited = 1,
  kBadType = 2,
  kStuck = 3,
  kBeyondShared = 4,
  kTooSoon = 5,
  kOnTheWay = 6,
  kGone = 7,
  kBarrier = 8,
  kUntold = 9
};

// Whether a block's threads run from the last to the first.
bool last_thread_first = false;

// How many have there been.
int launches = 0;

// How often a power tile's word was one claim and became another.
std::array<std::array<int, 3>, 3> claims_met;

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

thread_local std::vector<Copies> copies;  // of the block that the host's thread plays
thread_local size_t current_thread = 0;

// A block's shared memory, and behind it some where nothing may be written.
class Shared {
 public:
  explicit Shared(uint32_t bytes)
      : bytes_(uint32_t(round_up(bytes, 16))),
        memory_(static_cast<unsigned char*>(std::aligned_alloc(16, bytes_ + kBeyond)), &std::free) {
    std::memset(memory_.get(), 0xff, bytes_ + kBeyond);  // NaN
  }
  unsigned char* begin() { return memory_.get(); }
  void scramble(Random& random, uint32_t from = 0) { fill_with_noise(memory_.get() + from, bytes_ - from, random); }
  void scramble(Random& random, uint32_t from, uint32_t end) {
    fill_with_noise(memory_.get() + from, end - from, random);
  }
  bool is_intact() const {
    return std::all_of(memory_.get() + bytes_, memory_.get() + bytes_ + kBeyond, [](int x) { return x == 0xff; });
  }

 private:
  static constexpr uint32_t kBeyond = 4096;
  uint32_t bytes_;
  std::unique_ptr<unsigned char, decltype(&std::free)> memory_;
};

// A launch's blocks that run side by side, in clusters of `cluster`.
struct Launch {
  Launch(int n, int of_cluster, uint32_t shared_bytes, uint32_t kept_from, uint64_t seed)
      : machine(n, seed), random(seed), cluster(of_cluster), kept_at(kept_from), arrived(size_t(n / of_cluster)) {
    for (int j = 0; j < n; ++j) shared.emplace_back(shared_bytes);
  }
  int blocks() const { return int(shared.size()); }

  Machine machine;
  Random random;
  int cluster;
  uint32_t kept_at;          // where in shared memory what a block keeps begins
  std::vector<int> arrived;  // at the barrier, of each cluster
  std::vector<Shared> shared;
};

// A tile has to wait, and has done nothing yet.
struct Postponed {
  const uint32_t* counter;
  uint32_t value;
};

template <int Threads>
class HostBlock {
 public:
  static constexpr int kThreads = Threads;
  static constexpr bool kHasClusters = true, kKeeps = true;

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

  // Of one that runs one tile.
  HostBlock(unsigned char* shared, bool may_wait) : shared_(shared), may_wait_(may_wait) { copies.assign(Threads, {}); }

  // Of one that runs beside others.
  HostBlock(Launch& launch, int number)
      : shared_(launch.shared[size_t(number)].begin()), may_wait_(true), launch_(&launch), number_(number) {
    copies.assign(Threads, {});
  }

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
    is_known_ = false;
  }
  template <class T>
  T told(uint32_t offset) {
    if (!is_known_) error_ = kUntold;
    return *shared<T>(offset);
  }

  // What it writes is written again if the tile has to wait.
  template <class F>
  void prepare(F f) {
    for (int thread = 0; thread < Threads; ++thread) f(thread);
  }

  void sync() { behind_barrier_ = is_known_ = true; }

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
    const uint32_t before = (*counter)++;
    be_overtaken();
    sync();
    return before;
  }
  uint32_t exchange(uint32_t* address, uint32_t value) {
    be_overtaken();
    const uint32_t before = std::exchange(*address, value);
    ++claims_met[size_t(before)][size_t(value)];
    sync();
    return before;
  }
  void wait(const uint32_t* counter, uint32_t value) {
    sync();
    if (*counter >= value) return;
    if (launch_) return launch_->machine.wait(number_, [=] { return *counter >= value; });
    if (may_wait_ && !begun_) throw Postponed{counter, value};
    error_ = kWaited;
  }

  void ask_for_ticket(uint32_t* counter) {
    be_overtaken();
    ticket_ = (*counter)++;
  }
  // What the block doesn't keep is noise then.
  uint32_t hand_out_ticket() {
    sync();
    const Kept kept = what_is_kept(*this);
    Shared& memory = launch_->shared[size_t(number_)];
    if (order_seed && kept.layer == 0) memory.scramble(launch_->random, kLanesAt);
    if (order_seed && kept.layer > 0 && kept.record_at == 0) {
      memory.scramble(launch_->random, kLanesAt, launch_->kept_at);
    }
    return ticket_;
  }

  uint32_t cluster() const { return uint32_t(number_ / launch_->cluster); }
  uint32_t clusters() const { return uint32_t(launch_->blocks() / launch_->cluster); }
  int rank() const { return number_ % launch_->cluster; }
  void arrive_in_cluster() {
    if (waits_for_ > 0) error_ = kBarrier;
    int& arrived = launch_->arrived[cluster()];
    waits_for_ = (arrived / launch_->cluster + 1) * launch_->cluster;
    ++arrived;
  }
  void wait_for_cluster() {
    const int until = waits_for_;
    if (until == 0) error_ = kBarrier;
    sync();
    waits_for_ = 0;
    launch_->machine.wait(number_, [this, until] { return launch_->arrived[cluster()] >= until; });
  }
  template <class T>
  const T* remote(uint32_t offset, int rank) {
    const int there = number_ - this->rank() + rank;
    if (launch_->machine.has_ended(there)) error_ = kGone;
    return reinterpret_cast<const T*>(launch_->shared[size_t(there)].begin() + offset);
  }

  Pack<float, 4> load_l2(const float* address) { return *reinterpret_cast<const Pack<float, 4>*>(address); }
  int error() const {
    const bool all_there = std::all_of(copies.begin(), copies.end(), [](const Copies& one) { return one.empty(); });
    return error_ || all_there ? error_ : kOnTheWay;
  }

 private:
  void be_overtaken() {
    if (launch_) launch_->machine.wait(number_, [] { return true; });
  }

  unsigned char* shared_;
  bool may_wait_, begun_ = false, behind_barrier_ = true, is_known_ = true;
  int error_ = 0;
  Launch* launch_ = nullptr;
  int number_ = 0, waits_for_ = 0;
  uint32_t ticket_ = 0;
};

}  // namespace

inline void begin_copy(void* to, const void* from, size_t bytes) {
  std::memset(to, 0xff, bytes);  // NaN
  copies[current_thread].begun.push_back({to, from, bytes});
}
