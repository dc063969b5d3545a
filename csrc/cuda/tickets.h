// Which tile a ticket stands for.
//
// A launch hands out tickets 0, 1, 2, ... Those of one phase of one layer follow each other: a segment. A layer's
// segments come in the order of its phases, and a tile waits only for its own layer's earlier phases: the smallest
// unfinished ticket never waits, whatever the other blocks do.
#pragma once

#include "portable.h"

namespace bssn::cuda {

struct Segment {
  uint32_t first;  // ticket
  uint32_t packed;

  static constexpr int kPhaseBits = 2;
  static Segment of(uint32_t first, uint32_t layer, uint32_t phase) { return {first, layer << kPhaseBits | phase}; }
  BSSN_HD int layer() const { return int(packed >> kPhaseBits); }
  BSSN_HD int phase() const { return int(packed & ((1u << kPhaseBits) - 1u)); }
};

// The last segment that does not begin after the ticket.
template <class Segments>
BSSN_HD Segment segment_of(const Segments& segments, int n, uint32_t ticket) {
  int low = 0, high = n;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (segments[middle].first <= ticket) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return segments[low];
}

}  // namespace bssn::cuda
