// How a forward call is cut into tiles.
#pragma once

#include "plan.h"
#include "power.h"
#include "rows.h"
#include "short_rows.h"

namespace bssn::cuda {

constexpr int64_t kFewestElements = 8192;  // of a power tile, if the layer has as many
constexpr int64_t kLongerThanShort = 48;   // rows that rows.h takes, though they may be short

// Of a power of two.
inline int log2(int64_t x) { return x == 1 ? 0 : 1 + log2(x / 2); }

// Elements of a row that a thread takes at a time, where the weight itself begins at a multiple of 16 bytes.
inline int pack_of(const Layer& layer, int64_t element) {
  const bool rows_begin_there = layer.columns() * element % 16 == 0;
  return rows_begin_there && (!layer.kernel_major() || layer.c_in % kMaxPack == 0) ? kMaxPack : 1;
}

// Whether gathered rows can be copied in pieces of 16 bytes.
inline bool has_pieces(const Layer& layer, int64_t element) {
  const auto fits = [&](int64_t elements) { return elements * element % 16 == 0; };
  return layer.stride_kernel == 1 && fits(layer.kernel) && (layer.c_in == 1 || fits(layer.stride_in)) &&
         (layer.c_out == 1 || fits(layer.stride_out)) && reinterpret_cast<uintptr_t>(layer.weight) % 16 == 0;
}

// The kind of rows.h for a layer, of those whose lanes have `elements` elements.
inline RowKind row_kind(const Layer& layer, int64_t elements) {
  if (elements > kRowElements) return layer.kernel == 9 && !layer.kernel_major() ? rows_9_long : no_rows;
  if (layer.kernel_major()) return layer.kernel == 9 ? rows_9_kernel_major : no_rows;
  switch (layer.kernel) {
    case 1:
      return rows_1;
    case 9:
      return rows_9;
    case 16:
      return rows_16;
    default:
      return no_rows;
  }
}

// How rows.h would take a layer: the kind, and how many warps share a row.
struct RowPlan {
  RowKind kind;
  int64_t warps, rows;  // rows of each group at a time

  int64_t groups() const { return kThreads / 32 / warps; }
};

inline RowPlan row_plan(const Layer& layer, int pack) {
  if (pack > 1 && layer.columns() > kLongerThanShort) {
    for (const int64_t elements : {kRowElements, 2 * kRowElements}) {
      RowPlan plan = {row_kind(layer, elements), 0, 1};
      with_row_shape(plan.kind, [&](auto shape) {
        using Shape = decltype(shape);
        plan.warps = divide_up(layer.columns() / Shape::kSize, 32 * Shape::kUnits);
        plan.rows = Shape::kRows;
      });
      if (plan.kind != no_rows && plan.warps <= kThreads / 32) return plan;
    }
  }
  return {is_short(layer.columns()) ? short_rows : no_rows, 1, 1};
}

// What the power iteration of a layer takes, in elements: a step of rows.h takes as long as some thousands of elements
// at least, however short its rows are.
inline double work_of(const Layer& layer, int pack) {
  constexpr int64_t kStep = 6144;
  const RowPlan plan = row_plan(layer, pack);
  if (plan.kind == no_rows || plan.kind == short_rows) return double(std::max(layer.size(), kFewestElements));
  return double(divide_up(layer.c_out, plan.groups()) * std::max(plan.groups() * layer.columns(), kStep));
}

// Output channels of a power tile. Each tile writes a share of t and r that is read again, so few large tiles move
// less; two tiles for each multiprocessor even out better than one.
inline int64_t channels_per_tile(const Layer& layer, double share, int pack) {
  const RowPlan plan = row_plan(layer, pack);
  const auto channels = [&](double tiles) { return int64_t(std::ceil(double(layer.c_out) / std::max(tiles, 1.0))); };
  constexpr int64_t kEnough = 16;
  const int64_t wanted = channels(2 * share) >= kEnough ? channels(2 * share) : std::min(channels(share), kEnough);
  if (plan.kind == short_rows) return std::min({std::max(wanted, int64_t(64)), int64_t(kThreads), layer.c_out});
  if (plan.kind != no_rows) {
    constexpr int64_t kFewSteps = 8;  // of a small layer: what is left to the end should be short
    const int64_t most = share < 2 ? kFewSteps * plan.groups() : layer.c_out;
    return std::min({round_up(wanted, plan.groups()), most, layer.c_out});
  }
  return std::min(std::max(wanted, divide_up(kFewestElements, layer.columns())), layer.c_out);
}

// Gives a layer to rows.h if it can, with as many steps of rows in shared memory as fit. Returns the shared memory that
// it needs, else 0.
inline int64_t plan_row_shape(const Layer& layer, int64_t element, int64_t channels, const Device& device,
                              const RowPlan& plan, ForwardLayer& out) {
  const int64_t room = device.shared_bytes - kAreaAt, row = layer.columns();
  const int64_t vectors = round_up(sizeof(float) * (row + layer.c_in), 16);
  for (int64_t groups = std::min(plan.groups(), channels); groups > 0; groups /= 2) {
    const int64_t rows = groups * plan.rows, stage = rows * row * element, steps = divide_up(channels, rows);
    const int64_t stages = std::min({room / stage, steps, int64_t(kMaxRowStages)});
    // t, and r for each unit of each group.
    const int64_t table = int64_t(sizeof(float)) * groups * (row + std::max(layer.c_in, row / 4));
    if (stages < std::min(steps, int64_t(2)) || std::max(table, vectors + stage) > room) continue;
    const int64_t vectors_at = std::min(round_up(stages * stage, 16), (room - vectors) / 16 * 16);
    out.rows = uint8_t(plan.kind);
    out.row_warps = uint8_t(plan.warps);
    out.groups = uint8_t(groups);
    out.stages = uint8_t(stages);
    out.stage_bytes = uint32_t(stage);
    out.vectors_at = uint16_t(vectors_at / 16);
    return kAreaAt + std::max(stages * stage, std::max(table, vectors_at + vectors));
  }
  return 0;
}

// Gives a layer of short rows to short_rows.h. Returns as above.
inline int64_t plan_short_rows(const Layer& layer, int64_t element, int64_t channels, const Device& device,
                               ForwardLayer& out) {
  const int64_t rows = channels, stage = round_up(rows * layer.columns() * element + 16, 16);
  const int64_t vectors = int64_t(sizeof(float)) * (layer.columns() + layer.c_in);
  const int64_t shared = kAreaAt + stage + vectors + short_scratch(rows, layer.kernel);
  if (shared > device.shared_bytes) return 0;
  out.rows = short_rows;
  out.groups = 1;
  out.stages = 1;
  out.stage_bytes = uint32_t(stage);
  out.vectors_at = uint16_t(stage / 16);
  return shared;
}

// Chooses how many threads share a row, and how many steps of rows lie in shared memory; leaves stage_bytes 0 if the
// rows do not fit there. Returns the shared memory that the layer needs.
inline int64_t plan_stages(const Layer& layer, int64_t element, int64_t channels, const Device& device, int pack,
                           ForwardLayer& out) {
  const auto walk = [&](int64_t threads) { return Walk(int(threads), int(layer.kernel), layer.kernel_major(), pack); };
  const auto share_rows = [&](int64_t threads) {
    out.group_shift = uint8_t(log2(threads));
    out.groups = uint8_t(kThreads / threads);
    out.stride = uint16_t(walk(threads).stride);
    const int64_t parts = std::max(int64_t(kSumParts), divide_up(walk(threads).same_k, Lane::kMaxTerms));
    out.q_parts = uint8_t(std::min(threads / layer.kernel, parts));
  };
  share_rows(kThreads);
  out.packed = pack > 1;
  out.stages = 0;
  out.stage_bytes = 0;
  out.gathered = !layer.channel_major() && !layer.kernel_major();
  out.pieces = out.gathered && has_pieces(layer, element);
  const int64_t length = layer.kernel_major() ? layer.c_in : layer.columns();
  const int most = pack == 1 ? kFewColumns : device.columns;
  out.rows = no_rows;
  const RowPlan plan = row_plan(layer, pack);
  int64_t shared = 0;
  if (plan.kind == short_rows) {
    shared = plan_short_rows(layer, element, channels, device, out);
  } else if (plan.kind != no_rows) {
    shared = plan_row_shape(layer, element, channels, device, plan, out);
  }
  if (shared > 0) return std::max(int64_t(kMinShared), shared);
  for (const int64_t threads : {32, 64, 128, kThreads}) {
    const int64_t groups = kThreads / threads, stride = walk(threads).stride;
    const bool is_last = groups == 1;
    if (layer.kernel > threads || stride == 0 || (groups > channels && !is_last)) continue;
    const int64_t columns = divide_up(length, stride) * pack;  // of one thread
    if (columns > most) continue;
    out.more_v = columns > kFewColumns;
    const int64_t vectors = out.u_bytes() + out.v_bytes(), room = device.shared_bytes - kAreaAt;
    const int64_t stage = round_up(groups * layer.columns() * element + 16, 16), steps = divide_up(channels, groups);
    const int64_t stages = std::min({(room - vectors) / stage, steps, int64_t(kMaxStages)});
    const int64_t table = 4 * groups * layer.columns();
    const bool may_improve = !is_last && steps > 1 && stages < 2;
    if (stages < 1 || table > room || may_improve) continue;
    share_rows(threads);
    out.stages = uint8_t(stages);
    out.stage_bytes = uint32_t(stage);
    return std::max({int64_t(kMinShared), kAreaAt + vectors + stages * stage, kAreaAt + table});
  }
  return kMinShared;
}

// Cuts a layer whose rows are not staged: see power_split.h. A power tile has at least kFewestElements of one row, or
// some whole rows; a reduce tile as many columns as leave enough tiles.
inline void plan_split(const Layer& layer, int64_t total, const Device& device, ForwardLayer& out) {
  const int64_t elements = std::max(total / (2 * device.multiprocessors), kFewestElements);
  const int64_t chunks = std::clamp(layer.columns() / elements, int64_t(1), layer.c_in);
  out.chunk = int32_t(divide_up(layer.c_in, chunks));
  out.channels = int32_t(std::clamp(elements / layer.columns(), int64_t(1), layer.c_out));
  out.tiles[power] = uint32_t(divide_up(layer.c_out, out.channels)) * out.chunks();
  const double tiles = std::max(2.0 * device.multiprocessors * double(layer.size()) / double(total), 1.0);
  constexpr int64_t kFewestColumns = 64;
  const int64_t columns = std::clamp(int64_t(double(layer.columns()) / tiles), kFewestColumns, int64_t(kSplitElements));
  out.column_channels = uint16_t(std::clamp(columns / layer.kernel, int64_t(1), layer.c_in));
  const int64_t of_tile = out.column_channels * layer.kernel;
  out.slices = uint8_t(std::clamp(kThreads / of_tile, int64_t(1), std::min(layer.c_out, kThreads / kFewestColumns)));
}

// columns: of t and r, for a reduce tile. The fewer, the more threads share one.
inline void plan_rows(const Layer& layer, int64_t channels, int64_t columns, ForwardLayer& out) {
  out.chunk = out.c_in;
  out.channels = int32_t(std::min(channels, layer.c_out));
  out.tiles[power] = uint32_t(divide_up(layer.c_out, out.channels));
  constexpr int kMostSlices = kThreads / 32;
  out.slices = 1;
  while (out.slices < kMostSlices && out.slices < out.tiles[power] &&
         4 * kThreads / out.slices > columns + columns / 2) {
    out.slices *= 2;
  }
}

// Floats that the power tiles leave for the reduce tiles.
inline int64_t shares_size(const ForwardLayer& layer, bool update) {
  if (layer.stage_bytes == 0) return layer.chunks() > 1 ? round_up(int64_t(layer.firsts()) * layer.chunks(), 4) : 0;
  return update ? int64_t(layer.tiles[power]) * layer.slot_size() : 0;
}

// Of all layers: elements, those of t and r, and what their power iterations take.
struct Total {
  int64_t size, columns;
  double work;
};

// A layer's tiles, where `pack` neighbouring elements of a row are taken at a time. Returns the shared memory they
// need.
inline int64_t plan_tiles(const Layer& layer, int64_t element, const Total& total, const Device& device, int pack,
                          const ForwardCall& call, ForwardLayer& to) {
  const double share = work_of(layer, pack) / total.work * device.multiprocessors;
  const int64_t channels = channels_per_tile(layer, share, pack);
  const int64_t shared = plan_stages(layer, element, channels, device, pack, to);
  const int64_t groups = to.groups;
  const int64_t reduced = call.update ? layer.columns() + (layer.two_sided ? layer.c_in : 0) : 0;
  to.tiles[reduce] = to.first_tiles();
  if (to.stage_bytes == 0) {
    plan_split(layer, total.size, device, to);
    to.tiles[reduce] += call.update ? uint32_t(divide_up(layer.c_in, to.column_channels)) : 0;
  } else {
    plan_rows(layer, round_up(channels, groups), total.columns / device.multiprocessors, to);
    to.tiles[reduce] += uint32_t(divide_up(reduced, 4 * kThreads / to.slices));
  }
  to.tiles[write] = uint32_t(divide_up(layer.size(), call.write_elements));
  return shared;
}

// Bytes that a tile moves, for the order of the segments.
inline std::array<Stage, kPhases> stages_of(const ForwardLayer& layer, const ForwardCall& call, int64_t element) {
  const double row_bytes = double(layer.row()) * double(element);
  const double column_tiles = std::max(layer.tiles[reduce] - layer.first_tiles(), 1u);
  const double power_bytes = double(layer.channels) * row_bytes / layer.chunks();
  const double reduce_bytes = layer.stage_bytes ? 4.0 * layer.tiles[power] * layer.slot_size() / column_tiles
                                                : double(layer.c_out) * row_bytes / column_tiles;
  return {{{layer.tiles[power], power_bytes},
           {layer.tiles[reduce], reduce_bytes},
           {layer.tiles[write], 2.0 * double(element) * call.write_elements}}};
}

inline void copy_pointers(const Layer& layer, ForwardLayer& to) {
  to.weight = layer.weight;
  to.output = layer.output;
  for (int v = 0; v < 4; ++v) {
    to.vectors[v] = layer.vectors[v];
    to.snapshot[v] = layer.snapshot[v];
  }
  to.number = number_of(layer);
  to.law = uint8_t(layer.law.kind);
  to.position = uint32_t(layer.position);
}

inline void copy_sizes(const Layer& layer, ForwardLayer& to) {
  to.c_out = int32_t(layer.c_out);
  to.c_in = int32_t(layer.c_in);
  to.kernel = int32_t(layer.kernel);
  to.both_sides = layer.two_sided != 0;
  to.kernel_major = layer.kernel_major();
  to.stride_out = int32_t(layer.stride_out);
  to.stride_in = int32_t(layer.stride_in);
  to.stride_kernel = int32_t(layer.stride_kernel);
}

// Fills in `call`, `out` and `segments` but for the workspace's address (offsets stand in its place) and what is not
// the plan's. out: one for each layer, in the order of `layers`, of which the largest comes first; segments: kPhases
// for each. The workspace does not depend on where the weights lie, nor on the number of launches.
inline Plan plan_forward(const std::vector<Layer>& layers, DType weight_type, const Device& device, bool one_launch,
                         ForwardCall& call, ForwardLayer* out, Segment* segments) {
  const int64_t element = element_size(weight_type);
  Total total = {total_size(layers), 0, 0};
  for (const Layer& layer : layers) {
    total.columns += layer.columns() + (layer.two_sided ? layer.c_in : 0);
    total.work += work_of(layer, pack_of(layer, element));
  }
  const int n = int(layers.size());
  Plan plan = {0, counter_bytes(n), 0, 0, kMinShared, {}};
  call.n_segments = n * kPhases;
  call.write_elements = flat_tile(total.size, device, 32768);
  int64_t sums = 0, slots = 0;
  std::vector<std::array<Stage, kPhases>> stages;
  for (int j = 0; j < n; ++j) {
    const Layer& layer = layers[size_t(j)];
    ForwardLayer& to = out[j];
    to = {};
    copy_pointers(layer, to);
    copy_sizes(layer, to);
    ForwardLayer unaligned = to;
    const int pack = pack_of(layer, element);
    int64_t shared = plan_tiles(layer, element, total, device, pack, call, to);
    int64_t shares = shares_size(to, call.update), reduce_tiles = to.tiles[reduce];
    if (pack > 1 && !to.gathered) {
      const int64_t shared_then = plan_tiles(layer, element, total, device, 1, call, unaligned);
      shares = std::max(shares, shares_size(unaligned, call.update));
      reduce_tiles = std::max(reduce_tiles, int64_t(unaligned.tiles[reduce]));
      if (reinterpret_cast<uintptr_t>(layer.weight) % 16 != 0) {
        to = unaligned;
        shared = shared_then;
      }
    }
    plan.shared_bytes = std::max(plan.shared_bytes, uint32_t(shared));
    to.slots = uint32_t(slots / 4);
    to.sums = uint32_t(sums);
    slots += shares;
    sums += reduce_tiles * kSums;
    stages.push_back(stages_of(to, call, element));
  }
  plan.phase_first = order_segments(stages, one_launch, device.multiprocessors * kForwardBlocks, segments);

  const int64_t records_at = plan.counter_bytes, sums_at = records_at + n * int64_t(sizeof(Record));
  const int64_t slots_at = round_up(sums_at + sums * int64_t(sizeof(double)), 16);
  call.counters = nullptr;
  call.records = reinterpret_cast<Record*>(records_at);
  call.sums = reinterpret_cast<double*>(sums_at);
  call.slots = reinterpret_cast<float*>(slots_at);
  plan.workspace_bytes = slots_at + slots * int64_t(sizeof(float));
  plan_table<ForwardLayer>(plan, n, call.n_segments);
  return plan;
}

inline void set_workspace(ForwardCall& call, uintptr_t workspace) {
  add_address(call.counters, workspace);
  add_address(call.records, workspace);
  add_address(call.sums, workspace);
  add_address(call.slots, workspace);
}

// The launches of a forward call: those of the plan for each iteration, of which only the last writes the normalised
// weights. reset() zeroes the counters.
template <class Reset, class Launch>
int launch_forward(ForwardCall& call, const Plan& plan, int64_t iterations, Reset reset, Launch launch) {
  const int64_t passes = std::max(iterations, int64_t(1));
  for (int64_t pass = 0; pass < passes; ++pass) {
    call.write_output = pass + 1 == passes;
    if (const int error = reset()) return error;
    if (const int error = launch_phases(call, plan, launch)) return error;
  }
  return 0;
}

}  // namespace bssn::cuda
