// Work on many layers in phases, dealt out in numbered tickets.
//
// A thread takes the next ticket and waits only for the earlier phase of the ticket's own layer. Those tickets have
// smaller numbers, and the smallest unfinished ticket never waits: there is no deadlock with any number of threads.
// The phases of a layer are one step apart, so that while the last tiles of a phase are under way the others work on
// the next layer, and a layer that fits into the cache is still there when its next phase reads it.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "parallel.h"

namespace bssn::cpu {

struct Ticket {
  int64_t layer, phase;
  int64_t tile;        // number within its layer and phase
  int64_t begin, end;  // rows or elements, as the phase has it
};

class Schedule {
 public:
  // tiles(layer, phase, add) calls add(begin, end) for each tile; all layers have `phases` phases.
  template <class Tiles>
  Schedule(int64_t layers, int64_t phases, Tiles tiles) : progress_(layers), counts_(layers * phases), phases_(phases) {
    for (int64_t step = 0; step < layers + phases - 1; ++step) {
      for (int64_t phase = phases - 1; phase >= 0; --phase) {
        const int64_t layer = step - phase;
        if (layer < 0 || layer >= layers) continue;
        int64_t count = 0;
        tiles(layer, phase,
              [&](int64_t begin, int64_t end) { tickets_.push_back({layer, phase, count++, begin, end}); });
        counts_[layer * phases + phase] = count;
      }
    }
    for (int64_t layer = 0; layer < layers; ++layer) progress_[layer].remaining = counts_[layer * phases];
  }

  int64_t size() const { return int64_t(tickets_.size()); }

  // `work` has tile(ticket, worker) and finish(layer, phase, worker), the latter called by whoever ends a phase's last
  // tile; worker < threads tells the threads apart.
  template <class Work>
  void run(Work& work, int threads) {
    struct Call {
      Schedule* schedule;
      Work* work;
      std::atomic<int> workers{0};
    } call{this, &work};
    run_parallel(
        threads,
        [](void* data) {
          Call& c = *static_cast<Call*>(data);
          c.schedule->take_tickets(*c.work, c.workers.fetch_add(1));
        },
        &call);
  }

 private:
  struct Progress {
    std::atomic<int64_t> remaining{0};  // tiles of the current phase
    std::atomic<int64_t> phase{0};      // phases that are complete
  };

  template <class Work>
  void take_tickets(Work& work, int worker) {
    for (int64_t number; (number = next_.fetch_add(1)) < size();) {
      const Ticket& ticket = tickets_[number];
      Progress& progress = progress_[ticket.layer];
      wait_for(progress, ticket.phase);
      work.tile(ticket, worker);
      if (progress.remaining.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        work.finish(ticket.layer, ticket.phase, worker);
        if (ticket.phase + 1 < phases_) progress.remaining = counts_[ticket.layer * phases_ + ticket.phase + 1];
        progress.phase.store(ticket.phase + 1, std::memory_order_release);
      }
    }
  }

  static void wait_for(const Progress& progress, int64_t phase) {
    // Give the core away after some microseconds: with more threads than cores the one awaited may need it.
    for (int spins = 0; progress.phase.load(std::memory_order_acquire) < phase; ++spins) {
      if (spins < 2000) {
#if defined(__x86_64__)
        _mm_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }
  }

  std::vector<Ticket> tickets_;
  std::vector<Progress> progress_;
  std::vector<int64_t> counts_;  // [layer][phase]
  int64_t phases_;
  std::atomic<int64_t> next_{0};
};

}  // namespace bssn::cpu
