// What the forward kernel is told: one description for each layer, by value, and what all layers of a call share.
#pragma once

#include "multiplier.h"
#include "tickets.h"

namespace bssn::cuda {

constexpr int kForwardBlocks = 1;   // on a multiprocessor at a time
constexpr int kThreads = 256;       // of a block; 255 registers each, so that one block fills a multiprocessor
constexpr int kMaxPack = 4;         // neighbouring elements of a row that a thread takes at a time
constexpr int kMaxStages = 4;       // steps of channels in shared memory at a time
constexpr int kMaxRowStages = 6;    // the same: see rows.h
constexpr int kMaxKeptStages = 15;  // and of rows that stay there: see keeping.h
constexpr int kCluster = 8;         // blocks that share a whole layer: see cluster.h
constexpr int kMaxGroups = kThreads / 32;
constexpr int kSumParts = 16;  // partial sums that the last addition of a reduction over threads reads

// Elements of a row that one thread of the staged power iteration can be given, in packs of V. On Turing copies pass
// through registers, which leaves fewer; its 64 KiB of shared memory do not hold the rows that need more. What decides
// is what the code was compiled for, not what it runs on.
constexpr int kFewColumns = 32, kManyColumns = 56;
constexpr int columns_of_code(int architecture) { return architecture < 80 ? kFewColumns : kManyColumns; }
constexpr bool clusters_in_code(int architecture) { return architecture >= 90; }
constexpr bool keeping_in_code(int architecture) { return architecture >= 80; }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <int V>
constexpr int kColumns = kFewColumns;
#else
template <int V>
constexpr int kColumns = V == 1 ? kFewColumns : kManyColumns;
#endif
// Of v_out so many lie in registers, and the others in shared memory, as not all GPUs have registers for all of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
template <int V>
constexpr int kVColumns = V == 1 ? kFewColumns : 40;
#else
template <int V>
constexpr int kVColumns = kFewColumns;
#endif
constexpr uint32_t kMoreVBytes = (kManyColumns - kFewColumns) * kThreads * sizeof(float);

// A layer's tiles of each phase build on all of those of the phase before.
enum Phase : int {
  power = 0,   // some output channels: s, q, and their share of t and r
  reduce = 1,  // some elements of s and q, or of t and r, over all shares; the last tile of a layer makes its record
  write = 2,   // some elements of the normalised weight and of the vectors
  kPhases = 3,
  whole = kPhases  // a cluster has the layer to itself, and each of its blocks a power tile: see cluster.h
};

constexpr int kFirsts = 8 * kThreads;          // elements of s and q for a reduce tile
constexpr int kSplitElements = 12 * kThreads;  // of t and r, of a row that is not staged, for a reduce tile

// What the write phase needs to know of a layer.
struct Record {
  float multiplier;   // of the weight
  float factors[4];   // of u_out, v_out, u_in, v_in: the raw vectors times these are the new ones
  int32_t usable[2];  // output side, input side: whether there are new vectors at all
  int32_t unused;
};

struct Span {
  uint32_t first, end;
};

// The snapshots hold the raw vectors until the write phase.
struct ForwardLayer {
  const void* weight;
  void* output;
  float* vectors[4];   // u_out [c_out], v_out [c_in k], u_in [c_in], v_in [c_out k]
  float* snapshot[4];  // the same
  LawNumber number;
  int32_t c_out, c_in, kernel;
  union {
    int32_t stride_out;   // in elements
    uint32_t reduced_by;  // the first ticket after its reduce tiles, where rows are kept
  };
  union {
    int32_t stride_in;  // in elements
    uint32_t claims;    // where the words of its power tiles are, where rows are kept: see keeping.h
  };
  int32_t stride_kernel;  // in elements
  uint32_t tiles[kPhases];
  uint32_t slots;        // where its tiles' shares begin, in groups of 4 floats; in shared memory if it is a whole
  uint32_t sums;         // where its sums of squares and products begin, in doubles
  uint32_t stage_bytes;  // one step of channels in shared memory; 0: see power_split.h
  int32_t channels;      // of a power tile
  int32_t chunk;         // input channels of a power tile: all where rows are staged
  uint32_t position;     // in the call, and of its sigma
  union {
    uint16_t stride;    // in power.h: elements of a row between neighbouring packs of one thread
    uint16_t share_at;  // in rows.h: where in shared memory the groups' t and r are added up, in pieces of 16 bytes
  };
  uint16_t vectors_at;       // in rows.h: where in shared memory v_out and u_in come, in pieces of 16 bytes
  uint16_t column_channels;  // input channels of a reduce tile where rows are not staged
  union {
    uint8_t q_parts;      // in power.h: in which the numbers of a group's threads for one q are added up
    uint8_t lost_stages;  // of kept rows: the first ones, over which t and r are added up
  };
  uint8_t group_shift : 4;  // 2^this threads share an output channel
  uint8_t groups : 4;       // of them in a block
  uint8_t stages : 4;
  uint8_t slices : 4;  // threads that share an element of a reduce tile
  uint8_t both_sides : 1;
  uint8_t packed : 1;        // staged rows begin at multiples of 16 bytes
  uint8_t kernel_major : 1;  // [o][k][i] rather than [o][i][k]
  uint8_t gathered : 1;      // rows are put together, as [i][k], from where their elements lie
  uint8_t pieces : 1;        // of 16 bytes, gathered rows that is
  uint8_t more_v : 1;        // rows have more elements than all GPUs have registers for, of v_out
  uint8_t keeps : 1;         // the last rows of a power tile stay in shared memory until they are written
  uint8_t law;               // LawKind
  uint8_t rows : 4;          // RowKind; 0: power.h
  uint8_t row_warps : 4;     // that share a row, in rows.h

  BSSN_HD bool two_sided() const { return both_sides != 0; }
  BSSN_HD int group_threads() const { return 1 << group_shift; }
  BSSN_HD int row() const { return c_in * kernel; }
  // Elements of s and q, and how many reduce tiles have their sums: the first ones.
  BSSN_HD uint32_t firsts() const { return uint32_t(c_out) * (two_sided() ? uint32_t(kernel) + 1u : 1u); }
  BSSN_HD uint32_t first_tiles() const { return uint32_t((uint64_t(firsts()) + kFirsts - 1) / kFirsts); }
  BSSN_HD Span firsts_of(uint32_t tile) const {
    const uint32_t first = tile * kFirsts, left = firsts() - first;
    return {first, first + lesser(left, kFirsts)};
  }
  BSSN_HD uint32_t chunks() const { return uint32_t(c_in - 1) / uint32_t(chunk) + 1u; }
  // Output channels of the power tiles that have the `rows`-th part of them.
  BSSN_HD uint32_t first_channel(uint32_t rows) const { return rows * uint32_t(channels); }
  BSSN_HD uint32_t end_channel(uint32_t rows) const {
    return lesser(first_channel(rows) + uint32_t(channels), uint32_t(c_out));
  }
  // Of v_out in shared memory.
  BSSN_HD uint32_t v_bytes() const { return more_v ? kMoreVBytes : 0u; }
  // Of u_in in shared memory: a number for each element of a row, or where channels lie innermost for each channel.
  BSSN_HD uint32_t u_bytes() const {
    return two_sided() ? (uint32_t(kernel_major ? c_in : row()) * uint32_t(sizeof(float)) + 15u) & ~15u : 0u;
  }
  // Floats of a staged power tile's share: t [row], and in two directions r [c_in].
  BSSN_HD uint32_t slot_size() const { return (uint32_t(row()) + (two_sided() ? uint32_t(c_in) : 0u) + 3u) & ~3u; }
};

constexpr int kSums = 6;  // of each reduce tile: s s, u_out s, q q, v_in q, t t, r r

// A thread's part of them.
struct ThreadSums {
  double x[kSums];
};

struct ForwardCall {
  uint32_t* counters;  // tickets taken [kPhases + 1], then for each layer: see Counter
  Record* records;
  double* sums;
  float* slots;
  float* sigmas;  // one number for each layer
  double eps;
  int32_t n_segments;
  int32_t output_type;                // DType
  uint32_t write_elements;            // of a write tile
  uint32_t whole_layers;              // the first segments, of a ticket each, which no block has to take
  uint32_t first_ticket, end_ticket;  // of this launch
  uint32_t ticket_counter;            // which of the launch
  bool update;                        // a power iteration; else evaluation
  bool write_output;                  // false in all but the last of several iterations

  // Whether a layer's normalised weight is wanted.
  BSSN_HD bool writes(const ForwardLayer& layer) const { return write_output && layer.output != nullptr; }

  BSSN_HD float* slot(const ForwardLayer& layer, uint32_t power_tile) const {
    return slots + 4 * uint64_t(layer.slots) + uint64_t(power_tile) * layer.slot_size();
  }
};

enum Counter : int { power_done = 0, reduce_done = 1, recorded = 2, chunks_done = 3, kCounters = 4 };

BSSN_HD uint32_t* counter_of(uint32_t* counters, int layer, int counter) {
  return counters + (kPhases + 1) + layer * kCounters + counter;
}

template <int Capacity>
struct ForwardArgs {
  ForwardCall call;
  Segment segments[Capacity * kPhases];
  ForwardLayer layers[Capacity];
};

struct ForwardTableArgs {
  ForwardCall call;
  const Segment* segments;  // in device memory
  const ForwardLayer* layers;
};

}  // namespace bssn::cuda
