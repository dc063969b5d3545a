// How the power iteration takes the rows of a layer: which of its paths, and what lies in shared memory.
#pragma once

#include "plan.h"
#include "power.h"
#include "rows.h"
#include "short_rows.h"

namespace bssn::cuda {

constexpr int64_t kLongerThanShort = 48;  // rows that rows.h takes, though they may be short

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

// Which rows of a power tile are to stay in shared memory: see keeping.h.
enum class Keeping { none, some, all };

// Of a power tile of rows.h, in bytes: a step, how many there are room for, those of them that the groups' t and r are
// added up over, where v_out and u_in and where t and r lie, and all of it.
struct RowRoom {
  int64_t stage, stages, lost, vectors_at, share_at, bytes;
};

// With `groups` groups of warps. No stages: there is not enough room.
inline RowRoom row_room(const Layer& layer, int64_t element, int64_t channels, int64_t room, const RowPlan& plan,
                        int64_t groups, Keeping keeping) {
  const bool keeps = keeping != Keeping::none;
  const int64_t row = layer.columns(), stage = groups * plan.rows * row * element;
  const int64_t steps = divide_up(channels, groups * plan.rows), fewest = std::min(steps, int64_t(2));
  const int64_t most = std::min(steps, int64_t(keeps ? kMaxKeptStages : kMaxRowStages));
  const int64_t vectors = round_up(int64_t(sizeof(float)) * (row + layer.c_in), 16);
  // t, and r for each unit of each group. Where rows stay a single group writes its share at once.
  const int64_t of_group = int64_t(sizeof(float)) * (row + std::max(layer.c_in, row / 4));
  const int64_t table = keeps && groups == 1 && plan.kind != rows_16 ? 0 : groups * of_group;
  const auto enough = [&](const RowRoom& found) { return found.stages >= fewest && found.bytes <= room; };

  // In the place of the first rows, or behind all of them, whichever keeps more.
  const int64_t in_place = std::min(most, room / stage);
  const int64_t vectors_at = std::min(in_place * stage, (room - vectors) / 16 * 16);
  const RowRoom over = {stage,      in_place, divide_up(table, stage),
                        vectors_at, 0,        std::max({in_place * stage, table, vectors_at + vectors})};
  const bool over_fits = enough(over) && vectors + stage <= room;
  if (!keeps) return over_fits ? over : RowRoom{};
  const int64_t behind = std::max(table, vectors),
                stages = std::max(std::min(most, (room - behind) / stage), int64_t(0));
  const RowRoom after = {stage, stages, 0, stages * stage, stages * stage, stages * stage + behind};
  if (keeping == Keeping::all) return stages == steps && enough(after) ? after : RowRoom{};
  if (over_fits && over.stages - over.lost > stages) return over;
  return enough(after) ? after : RowRoom{};
}

// Gives a layer to rows.h if it can, with as many steps of rows in shared memory as fit. Returns the shared memory that
// it needs, else 0.
inline int64_t plan_row_shape(const Layer& layer, int64_t element, int64_t channels, const Device& device,
                              const RowPlan& plan, Keeping keeping, ForwardLayer& out) {
  for (int64_t groups = std::min(plan.groups(), channels); groups > 0; groups /= 2) {
    const int64_t room = device.shared_bytes - kAreaAt;
    const RowRoom found = row_room(layer, element, channels, room, plan, groups, keeping);
    if (found.stages == 0) continue;
    out.rows = uint8_t(plan.kind);
    out.row_warps = uint8_t(plan.warps);
    out.groups = uint8_t(groups);
    out.stages = uint8_t(found.stages);
    out.stage_bytes = uint32_t(found.stage);
    out.vectors_at = uint16_t(found.vectors_at / 16);
    out.share_at = uint16_t(found.share_at / 16);
    out.lost_stages = uint8_t(found.lost);
    out.keeps = keeping != Keeping::none;
    return kAreaAt + found.bytes;
  }
  return 0;
}

// Gives a layer of short rows to short_rows.h. Returns as above.
inline int64_t plan_short_rows(const Layer& layer, int64_t element, int64_t channels, const Device& device,
                               ForwardLayer& out) {
  const int64_t rows = channels, stage = round_up(rows * layer.columns() * element + 16, 16);
  const int64_t vectors = int64_t(sizeof(float)) * (layer.columns() + layer.c_in);
  const int64_t shared = kAreaAt + stage + vectors + short_scratch(rows, layer.kernel);
  if (rows > kThreads || shared > device.shared_bytes) return 0;  // a thread has one row at most
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
                           Keeping keeping, ForwardLayer& out) {
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
    // Gathered rows lie in another order in memory.
    if (!out.gathered) shared = plan_row_shape(layer, element, channels, device, plan, keeping, out);
    if (shared == 0) shared = plan_row_shape(layer, element, channels, device, plan, Keeping::none, out);
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

}  // namespace bssn::cuda
