// A hash of all bytes of stretches of memory, to tell whether anything has been written there. Any single change of a
// number is seen for certain, others with probability 1 - 2^-64: every word, lane and chunk enters by a bijection of
// what came before, and in an order.
#include <algorithm>
#include <array>
#include <cstring>
#include <new>
#include <vector>

#include "cpu.h"
#include "kernels.h"
#include "schedule.h"

namespace bssn::cpu {
namespace {

// Hashed by itself, so that threads can share a tensor. Part of the result: it must not depend on the machine.
constexpr int64_t kChunk = 128 * 1024;
constexpr int kLanes = kHashStripe / 8;

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 32)) * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 29)) * 0xd6e8feb86659fd93u;
  return x ^ (x >> 32);
}

std::array<uint64_t, kLanes> make_seeds() {
  std::array<uint64_t, kLanes> seeds;
  for (int lane = 0; lane < kLanes; ++lane) seeds[lane] = mix(uint64_t(lane) + 1);
  return seeds;
}

uint64_t hash_chunk(const unsigned char* data, int64_t bytes) {
  static const std::array<uint64_t, kLanes> seeds = make_seeds();
  std::array<uint64_t, kLanes> lanes = seeds;
  const int64_t stripes = bytes / kHashStripe, rest = bytes % kHashStripe;
  const HashStripes take = hash_stripes();
  take(data, stripes, lanes.data());
  if (rest != 0) {
    unsigned char padded[kHashStripe] = {};
    std::memcpy(padded, data + stripes * kHashStripe, size_t(rest));
    take(padded, 1, lanes.data());
  }
  // Four at a time, as each waits for the one before.
  std::array<uint64_t, 4> sums = {uint64_t(bytes), 1, 2, 3};  // the padding looks like zeros
  for (size_t lane = 0; lane < kLanes; ++lane) sums[lane % 4] = mix(sums[lane % 4] ^ lanes[lane]);
  return mix(mix(mix(sums[0] ^ sums[1]) ^ sums[2]) ^ sums[3]);
}

class Hash {
 public:
  Hash(const int64_t* addresses, const int64_t* sizes, int64_t n, uint64_t* out)
      : addresses_(addresses), sizes_(sizes), out_(out), first_(size_t(n) + 1) {
    for (int64_t j = 0; j < n; ++j) first_[j + 1] = first_[j] + chunk_count(j);
    chunks_.resize(size_t(first_[n]));
  }

  template <class Add>
  void tiles(int64_t j, Add add) const {
    for (int64_t chunk = 0; chunk < chunk_count(j); ++chunk)
      add(chunk * kChunk, std::min((chunk + 1) * kChunk, sizes_[j]));
  }

  void tile(const Ticket& ticket, int) {
    const auto* data = reinterpret_cast<const unsigned char*>(addresses_[ticket.layer]);
    chunks_[first_[ticket.layer] + ticket.tile] = hash_chunk(data + ticket.begin, ticket.end - ticket.begin);
  }

  void finish(int64_t j, int64_t, int) {
    uint64_t hash = uint64_t(sizes_[j]);
    for (int64_t chunk = first_[j]; chunk < first_[j + 1]; ++chunk) hash = mix(hash ^ chunks_[chunk]);
    out_[j] = hash;
  }

 private:
  int64_t chunk_count(int64_t j) const { return std::max<int64_t>(1, (sizes_[j] + kChunk - 1) / kChunk); }

  const int64_t *addresses_, *sizes_;
  uint64_t* out_;
  std::vector<int64_t> first_;    // number of each tensor's first chunk
  std::vector<uint64_t> chunks_;  // their hashes
};

}  // namespace

int hash(const int64_t* addresses, const int64_t* sizes, int64_t n, int threads, uint64_t* out) {
  try {
    int64_t bytes = 0;
    for (int64_t j = 0; j < n; ++j) bytes += sizes[j];
    Hash work(addresses, sizes, n, out);
    Schedule schedule(n, 1, [&](int64_t j, int64_t, auto add) { work.tiles(j, add); });
    // Less than two chunks a thread take no longer than to wake it.
    schedule.run(work, int(std::max<int64_t>(1, std::min<int64_t>(threads, bytes / (2 * kChunk)))));
    return ok;
  } catch (const std::bad_alloc&) {
    return out_of_memory;
  }
}

}  // namespace bssn::cpu
