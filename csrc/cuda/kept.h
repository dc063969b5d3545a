// What a block keeps in shared memory from one tile of a layer to the end of it, while it goes on with other tickets.
//
// To write it the block may have to wait for the layer's record. It does so only if its ticket is larger than those of
// all tiles that the record needs: then every wait is for smaller tickets, and the smallest unfinished one never waits.
// Else it drops what it has, and the tile's write ticket reads it again. Which of the two writes it is settled by one
// word for each tile.
#pragma once

#include "reductions.h"

namespace bssn::cuda {

// A tile's word: 0 at first.
enum Claim : uint32_t { dropped = 1, passed = 2 };  // by the block that had the rows; by the write ticket

// What a block keeps, in its shared memory.
struct Kept {
  uint32_t layer;      // its number plus 1, or 0
  uint32_t tile;       // of its first phase
  uint32_t record_at;  // where in shared memory its record is, or 0: in the workspace, once it is there
};

constexpr uint32_t kKeptAt = sizeof(uint32_t);
static_assert(kKeptAt + sizeof(Kept) <= kLanesAt, "shared memory");

// After a barrier.
template <class Block>
BSSN_HD Kept what_is_kept(Block& block) {
  return block.template told<Kept>(kKeptAt);
}

template <class Block>
BSSN_HD void keep(Block& block, int layer, uint32_t tile, uint32_t record_at = 0) {
  block.lead([&] { *block.template shared<Kept>(kKeptAt) = {uint32_t(layer) + 1, tile, record_at}; });
}

template <class Block>
BSSN_HD void keep_nothing(Block& block) {
  block.lead([&] { *block.template shared<Kept>(kKeptAt) = {0, 0, 0}; });
}

// The layer's record, before the block goes on with `ticket`: waits for it, or drops what is kept. False if it is
// dropped. `first_behind`: the first ticket behind all those that the record needs.
template <class Block>
BSSN_HD bool get_record(Block& block, uint32_t ticket, uint32_t first_behind, const uint32_t* recorded,
                        uint32_t* claim) {
  if (ticket < first_behind) return block.exchange(claim, dropped) == passed;  // the write ticket has waited for it
  block.wait(recorded, 1);
  return true;
}

}  // namespace bssn::cuda
