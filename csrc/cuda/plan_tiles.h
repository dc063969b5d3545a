// How a layer is cut into tiles.
#pragma once

#include "order_forward.h"
#include "plan_power.h"

namespace bssn::cuda {

constexpr int64_t kFewestElements = 8192;  // of a power tile, if the layer has as many

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
inline int64_t channels_per_tile(const Layer& layer, double share, int pack, bool keeps) {
  const RowPlan plan = row_plan(layer, pack);
  const auto channels = [&](double tiles) { return int64_t(std::ceil(double(layer.c_out) / std::max(tiles, 1.0))); };
  // Rows that stay: one tile for each multiprocessor, which no other is to follow before they are written.
  const bool is_row = plan.kind != no_rows && plan.kind != short_rows;
  if (keeps && is_row) return std::min(round_up(channels(std::floor(share)), plan.groups()), layer.c_out);
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

// Of some layers: elements, those of t and r, what their power iterations take, and how many multiprocessors they
// share.
struct Total {
  int64_t size = 0, columns = 0;
  double work = 0, multiprocessors;

  Total(const Layer* begin, const Layer* end, int64_t element, const Device& device, bool keeps)
      : multiprocessors(device.multiprocessors) {
    std::vector<double> works;
    for (const Layer* layer = begin; layer != end; ++layer) {
      size += layer->size();
      columns += layer->columns() + (layer->two_sided ? layer->c_in : 0);
      works.push_back(work_of(*layer, pack_of(*layer, element)));
      work += works.back();
    }
    if (!keeps) return;
    // Where rows stay there are no more tiles than multiprocessors. The smallest layers take a whole one each.
    std::sort(works.begin(), works.end());
    for (const double least : works) {
      if (share_of(least) >= 1 || multiprocessors <= 1) return;
      work -= least;
      multiprocessors -= 1;
    }
  }

  double share_of(double of_layer) const { return of_layer / work * multiprocessors; }
};

// A layer's tiles, where `pack` neighbouring elements of a row are taken at a time and the multiprocessors are shared
// with layers of that total. Returns the shared memory they need.
inline int64_t plan_tiles(const Layer& layer, int64_t element, const Total& total, const Device& device, int pack,
                          bool keeps, const ForwardCall& call, ForwardLayer& to) {
  const double share = total.share_of(work_of(layer, pack));
  const int64_t channels = channels_per_tile(layer, share, pack, keeps);
  const Keeping keeping = keeps ? Keeping::some : Keeping::none;
  const int64_t shared = plan_stages(layer, element, channels, device, pack, keeping, to);
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
  to.tiles[write] = to.keeps ? to.tiles[power] : uint32_t(divide_up(layer.size(), call.write_elements));
  return shared;
}

// Gives a layer to a cluster, each of whose blocks has one power tile, with rows that stay where rows.h takes them. The
// share of a tile lies in shared memory behind all else. Returns the shared memory, or 0 if there is not enough.
inline int64_t plan_whole(const Layer& layer, int64_t element, const Device& device, int pack, ForwardLayer& to) {
  const int64_t share = int64_t(sizeof(float)) * to.slot_size();
  Device without = device;
  without.shared_bytes -= share;
  if (without.shared_bytes < kMinShared || layer.size() * element > kCluster * without.shared_bytes) return 0;
  const int64_t channels = divide_up(layer.c_out, kCluster);
  const int64_t shared = round_up(plan_stages(layer, element, channels, without, pack, Keeping::all, to), 16);
  const bool is_row = to.rows != no_rows && to.rows != short_rows;
  if (to.stage_bytes == 0 || (is_row && !to.keeps && !to.gathered)) return 0;
  plan_rows(layer, round_up(channels, to.groups), 0, to);
  to.tiles[reduce] = 0;
  to.tiles[write] = kCluster;
  to.slots = uint32_t(shared / 16);
  return shared + share;
}

// Bytes that a tile moves, for the order of the segments.
inline Stages stages_of(const ForwardLayer& layer, const ForwardCall& call, int64_t element) {
  const double row_bytes = double(layer.row()) * double(element);
  const double column_tiles = std::max(layer.tiles[reduce] - layer.first_tiles(), 1u);
  const double power_bytes = double(layer.channels) * row_bytes / layer.chunks();
  const double reduce_bytes = layer.stage_bytes ? 4.0 * layer.tiles[power] * layer.slot_size() / column_tiles
                                                : double(layer.c_out) * row_bytes / column_tiles;
  return {{{layer.tiles[power], power_bytes},
           {layer.tiles[reduce], reduce_bytes},
           {layer.tiles[write], 2.0 * double(element) * call.write_elements}}};
}

}  // namespace bssn::cuda
