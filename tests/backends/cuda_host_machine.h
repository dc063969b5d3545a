// Blocks that run side by side, as far as their waits and barriers tell: each has a host thread, and one of them runs
// at a time, until it waits or could have been overtaken. Which one goes on then is drawn from a seed.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

// All blocks that are left wait.
struct Stuck {};

class Machine {
 public:
  Machine(int blocks, uint64_t seed) : random_(seed), slow_for_(4u << seed % 4 * 3), blocks_(size_t(blocks)) {}

  // Runs body(number) for each block. Returns false if they got stuck.
  template <class F>
  bool run(F body) {
    std::vector<std::thread> threads;
    running_ = choose();
    for (size_t number = 0; number < blocks_.size(); ++number) {
      threads.emplace_back([this, number, &body] {
        try {
          go_on(int(number));
          body(int(number));
        } catch (const Stuck&) {
        }
        const std::lock_guard<std::mutex> lock(mutex_);
        blocks_[number].has_ended = true;
        pass_on();
      });
    }
    for (std::thread& thread : threads) thread.join();
    return !is_stuck_;
  }

  // The running block lets others run, and goes on once the condition holds.
  void wait(int number, std::function<bool()> condition) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      blocks_[size_t(number)].condition = std::move(condition);
      pass_on();
    }
    go_on(number);
  }

  bool has_ended(int number) const { return blocks_[size_t(number)].has_ended; }

 private:
  struct Block {
    std::function<bool()> condition = [] { return true; };
    bool has_ended = false;
  };

  void go_on(int number) {
    std::unique_lock<std::mutex> lock(mutex_);
    turn_.wait(lock, [&] { return running_ == number || is_stuck_; });
    if (is_stuck_) throw Stuck{};
  }

  void pass_on() {
    running_ = choose();
    for (const Block& block : blocks_) is_stuck_ |= running_ < 0 && !block.has_ended;
    turn_.notify_all();
  }

  int choose() {
    std::vector<int> ready;
    for (size_t number = 0; number < blocks_.size(); ++number) {
      if (!blocks_[number].has_ended && blocks_[number].condition()) ready.push_back(int(number));
    }
    // Another one each time is overtaken by all that can, for a while.
    if (random_() % slow_for_ == 0) slow_ = int(random_() % blocks_.size());
    if (ready.size() > 1) ready.erase(std::remove(ready.begin(), ready.end(), slow_), ready.end());
    return ready.empty() ? -1 : ready[random_() % ready.size()];
  }

  std::mt19937_64 random_;
  uint64_t slow_for_;
  int slow_ = -1;
  std::vector<Block> blocks_;
  std::mutex mutex_;
  std::condition_variable turn_;
  int running_ = -1;
  bool is_stuck_ = false;
};
