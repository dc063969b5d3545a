// The power iteration's pass over W where rows begin at multiples of 16 bytes and kernels have one of a few sizes: the
// layers that most models consist of. power.h has the formulas, and serves all other rows.
//
// One or more warps share a row. A lane has some of its elements, the same in each row, and with them in registers
// those of v_out and u_in, its sums for t and r, and mostly, between s and t, the row's elements themselves. s and q
// are added up by shuffles, and a step, one or two rows for each group of warps, needs one barrier.
#pragma once

#include "staging.h"

namespace bssn::cuda {

// What a lane has of a row: units, `kUnits` of at most `Elements` elements together. A unit is a pack of 4 neighbouring
// elements, or 4 input channels with all their kernel positions: where the kernel's size is odd, so that the lanes'
// packs lie in different banks and each unit sees the positions alike; and where channels lie innermost.
template <int Kernel, bool KernelMajor, int Elements>
struct RowShape {
  static constexpr int kKernel = Kernel;
  static constexpr bool kKernelMajor = KernelMajor;
  static constexpr bool kWholeChannels = KernelMajor || Kernel % 2 == 1;
  static constexpr int kPacks = kWholeChannels ? Kernel : 1;  // of a unit
  static constexpr int kSize = 4 * kPacks;
  static constexpr int kUnits = Elements / kSize;
  static constexpr int kChannels = kWholeChannels ? 4 : Kernel < 4 ? 4 / Kernel : 1;  // of a unit
  static constexpr int kClasses = !kWholeChannels && Kernel > 4 ? Kernel / 4 : 1;     // units that share a channel
  static constexpr int kPositions = Kernel / kClasses;                                // of a unit
  static constexpr int kNumbers = 1 + kPositions;                                     // of a row: s and q
  // Rows that lie in a lane's registers at a time: what takes long between two barriers then serves both.
  static constexpr int kRegisters = 2 * kUnits * (kSize + kChannels);
  static constexpr int kRows = kRegisters + 2 * kUnits * kSize <= 160 && 2 * kNumbers * kClasses <= 32 ? 2 : 1;
  static constexpr bool kKeepsRows = kRegisters + kRows * kUnits * kSize <= 176;
  static_assert(kUnits > 0 && 32 % kClasses == 0);

  static BSSN_HD constexpr int channel_of(int e) { return KernelMajor ? e % 4 : e / kPositions; }
  static BSSN_HD constexpr int position_of(int e) { return KernelMajor ? e / 4 : e % kPositions; }
  // Where a pack of a unit lies in the row.
  static BSSN_HD int offset(const ForwardLayer& layer, int unit, int pack) {
    return KernelMajor ? pack * layer.c_in + 4 * unit : unit * kSize + 4 * pack;
  }
  static BSSN_HD int units(const ForwardLayer& layer) { return layer.row() / kSize; }
};

template <class Shape>
struct RowThread {
  int unit;        // the lane's first, then every 32nd
  int group;       // of warps that share a row
  int first_warp;  // of the group
  float v[Shape::kUnits * Shape::kSize], t[Shape::kUnits * Shape::kSize];
  float u[Shape::kUnits * Shape::kChannels], r[Shape::kUnits * Shape::kChannels];
  float rows[Shape::kKeepsRows ? Shape::kRows * Shape::kUnits * Shape::kSize : 1];
  // s and q of each row: the lane's part, then of the whole row; then one number that the lane is to write.
  float sums[Shape::kRows * Shape::kNumbers + 1];

  BSSN_HD void take_place(const ForwardLayer& layer, int thread) {
    const int warp = thread / 32;
    group = warp / layer.row_warps;
    const int first = group * layer.row_warps;
    first_warp = first + layer.row_warps <= kThreads / 32 ? first : 0;  // warps that are left over read what is there
    unit = (warp - first) * Shape::kUnits * 32 + thread % 32;
  }
  BSSN_HD bool leads() const { return unit < 32; }  // its row's warps
};

// v_out, in the order of a row, and then u_in begin to be copied into shared memory.
template <class Shape>
BSSN_HD void begin_vectors(const ForwardLayer& layer, float* to, int thread) {
  const int row = layer.row();
  if constexpr (Shape::kKernelMajor) {
    BSSN_UNROLL_BY(1)
    for (int i = thread; i < layer.c_in; i += kThreads) {
      BSSN_UNROLL
      for (int k = 0; k < Shape::kKernel; ++k) {
        copy_element(to + k * layer.c_in + i, layer.vectors[1] + i * Shape::kKernel + k);
      }
    }
  } else if (reinterpret_cast<uintptr_t>(layer.vectors[1]) % 16 == 0) {
    BSSN_UNROLL_BY(1)
    for (int x = 4 * thread; x < row; x += 4 * kThreads) copy16(to + x, layer.vectors[1] + x);
  } else {
    BSSN_UNROLL_BY(1)
    for (int x = thread; x < row; x += kThreads) copy_element(to + x, layer.vectors[1] + x);
  }
  BSSN_UNROLL_BY(1)
  for (int i = layer.two_sided() ? thread : layer.c_in; i < layer.c_in; i += kThreads) {
    copy_element(to + row + i, layer.vectors[2] + i);
  }
}

// A lane's part of the vectors: 0 where it has no element, so that what it reads in their place counts for nothing. In
// one direction u_in is 0, and nothing asks for q and r.
template <class Shape>
BSSN_HD void take_vectors(const ForwardLayer& layer, const float* from, RowThread<Shape>& my) {
  const int units = Shape::units(layer);
  BSSN_UNROLL
  for (int j = 0; j < Shape::kUnits; ++j) {
    const int unit = my.unit + 32 * j;
    const bool exists = unit < units, has_u = exists && layer.two_sided();
    const int there = exists ? unit : units - 1;
    BSSN_UNROLL
    for (int p = 0; p < Shape::kPacks; ++p) {
      float* const v = my.v + j * Shape::kSize + 4 * p;
      load_pack<4>(from + Shape::offset(layer, there, p), v);
      BSSN_UNROLL
      for (int e = 0; e < 4; ++e) v[e] = exists ? v[e] : 0.0f;
    }
    BSSN_UNROLL
    for (int c = 0; c < Shape::kChannels; ++c) {
      const int channel = there * Shape::kChannels / Shape::kClasses + c;
      my.u[j * Shape::kChannels + c] = has_u ? from[layer.row() + channel] : 0.0f;
    }
  }
}

template <class Shape, class W>
BSSN_HD void load_unit(const ForwardLayer& layer, const W* row, int unit, float* to) {
  const int last = Shape::units(layer) - 1, there = unit < last ? unit : last;
  BSSN_UNROLL
  for (int p = 0; p < Shape::kPacks; ++p) load_pack<4>(row + Shape::offset(layer, there, p), to + 4 * p);
}

// A lane's part of s and q, of the a-th row of a step.
template <class Shape, class W>
BSSN_HD void add_row(const ForwardLayer& layer, const W* row, RowThread<Shape>& my, int a) {
  constexpr int kParts = Shape::kPositions == 1 ? 4 : Shape::kPositions;  // short chains of additions
  float s[4] = {}, q[kParts] = {};
  BSSN_UNROLL
  for (int j = 0; j < Shape::kUnits; ++j) {
    float loaded[Shape::kSize];
    load_unit<Shape>(layer, row, my.unit + 32 * j, loaded);
    BSSN_UNROLL
    for (int e = 0; e < Shape::kSize; ++e) {
      const float w = loaded[e];
      if constexpr (Shape::kKeepsRows) my.rows[(a * Shape::kUnits + j) * Shape::kSize + e] = w;
      s[e % 4] += w * my.v[j * Shape::kSize + e];
      q[kParts == Shape::kPositions ? Shape::position_of(e) : e % 4] +=
          w * my.u[j * Shape::kChannels + Shape::channel_of(e)];
    }
  }
  float* const sums = my.sums + a * Shape::kNumbers;
  sums[0] = (s[0] + s[1]) + (s[2] + s[3]);
  if constexpr (kParts == Shape::kPositions) {
    BSSN_UNROLL
    for (int k = 0; k < Shape::kPositions; ++k) sums[1 + k] = q[k];
  } else {
    sums[1] = (q[0] + q[1]) + (q[2] + q[3]);
  }
}

// Adds the row, times s and q, to a lane's t and r.
template <class Shape, class W>
BSSN_HD void add_to_columns(const ForwardLayer& layer, const W* row, RowThread<Shape>& my, int a) {
  const float* const sums = my.sums + a * Shape::kNumbers;
  BSSN_UNROLL
  for (int j = 0; j < Shape::kUnits; ++j) {
    float loaded[Shape::kSize];
    if constexpr (!Shape::kKeepsRows) load_unit<Shape>(layer, row, my.unit + 32 * j, loaded);
    BSSN_UNROLL
    for (int e = 0; e < Shape::kSize; ++e) {
      const float w = Shape::kKeepsRows ? my.rows[(a * Shape::kUnits + j) * Shape::kSize + e] : loaded[e];
      my.t[j * Shape::kSize + e] += sums[0] * w;
      my.r[j * Shape::kChannels + Shape::channel_of(e)] += sums[1 + Shape::position_of(e)] * w;
    }
  }
}

// s and q of a group's rows, the first of which is channel o: each lane writes one number.
template <class Shape>
BSSN_HD void write_sums(const ForwardLayer& layer, uint32_t o, uint32_t end, const RowThread<Shape>& my, int lane) {
  constexpr int kAll = Shape::kRows * Shape::kNumbers;
  const int which = lane / kAll, number = lane - which * kAll;
  const int a = number / Shape::kNumbers, position = number - a * Shape::kNumbers - 1;
  const uint32_t channel = o + uint32_t(a * layer.groups);
  if (which >= Shape::kClasses || channel >= end) return;
  if (position >= 0) {
    if (!layer.two_sided()) return;
    const int k = which * Shape::kPositions + position;
    layer.snapshot[3][int64_t(channel) * Shape::kKernel + k] = my.sums[kAll];
  } else if (which == 0) {
    layer.snapshot[0][channel] = a == 0 ? my.sums[0] : my.sums[(Shape::kRows - 1) * Shape::kNumbers];
  }
}

// Adds the groups' t and r up in shared memory, and writes the tile's share. Where rows are kept there, a single group
// writes its own at once.
template <class Shape, class Block, class Registers>
BSSN_HD void write_row_share(Block& block, const ForwardLayer& layer, Registers& registers, float* slot) {
  const int row = layer.row(), groups = layer.groups, units = Shape::units(layer);
  const int channels = units * Shape::kChannels;  // each as often as units share it
  const bool is_share = Block::kKeeps && layer.keeps && groups == 1 && Shape::kClasses == 1;
  float* const table = is_share ? slot : block.template shared<float>(kAreaAt + 16u * layer.share_at);
  float* const r_table = table + groups * row;
  block.each([&](int thread) {
    const RowThread<Shape>& my = registers[thread];
    BSSN_UNROLL
    for (int j = 0; j < Shape::kUnits; ++j) {
      const int unit = my.unit + 32 * j;
      if (unit >= units || my.group >= groups) break;
      BSSN_UNROLL
      for (int p = 0; p < Shape::kPacks; ++p) {
        store_pack<4>(my.t + j * Shape::kSize + 4 * p, table + my.group * row + Shape::offset(layer, unit, p));
      }
      if (!layer.two_sided()) continue;
      BSSN_UNROLL
      for (int c = 0; c < Shape::kChannels; ++c) {
        r_table[my.group * channels + unit * Shape::kChannels + c] = my.r[j * Shape::kChannels + c];
      }
    }
  });
  if (is_share) return;
  block.each([&](int thread) {
    BSSN_UNROLL_BY(1)
    for (int x = 4 * thread; x < row; x += 4 * kThreads) {
      float sum[4] = {};
      BSSN_UNROLL_BY(4)
      for (int g = 0; g < groups; ++g) {
        float part[4];
        load_pack<4>(table + g * row + x, part);
        BSSN_UNROLL
        for (int e = 0; e < 4; ++e) sum[e] += part[e];
      }
      store_pack<4>(sum, slot + x);
    }
    BSSN_UNROLL_BY(1)
    for (int i = layer.two_sided() ? thread : layer.c_in; i < layer.c_in; i += kThreads) {
      float sum = 0;
      BSSN_UNROLL_BY(1)
      for (int g = 0; g < groups; ++g) {
        BSSN_UNROLL
        for (int c = 0; c < Shape::kClasses; ++c) sum += r_table[g * channels + i * Shape::kClasses + c];
      }
      slot[row + i] = sum;
    }
  });
}

// One tile, whose share goes to `slot`. A step is kRows rows for each group of warps; `layer.stages` of them lie in
// shared memory at a time.
template <class Shape, class W, class Block>
BSSN_HD void power_rows(Block& block, const ForwardCall& call, const ForwardLayer& layer, uint32_t tile, float* slot) {
  constexpr int kRows = Shape::kRows, kWarpNumbers = kRows * Shape::kNumbers * Shape::kClasses;
  const int groups = layer.groups, stages = layer.stages, of_step = groups * kRows;
  const uint32_t first = layer.first_channel(tile), end = layer.end_channel(tile);
  const int steps = (int(end - first) + of_step - 1) / of_step;
  float* const parts = block.template shared<float>(kLanesAt);  // the sums of a step's warps, of two steps at a time
  static_assert(2 * kWarpNumbers * (kThreads / 32) * sizeof(float) <= kPartsAt - kLanesAt, "shared memory");
  unsigned char* const area = block.template shared<unsigned char>(kAreaAt);
  float* const vectors = block.template shared<float>(kAreaAt + 16u * layer.vectors_at);

  typename Block::template PerThread<RowThread<Shape>> registers;
  block.all([&](int thread) {
    // What is first written under a condition would keep its registers through the whole kernel.
    registers[thread] = RowThread<Shape>{};
    registers[thread].take_place(layer, thread);
    begin_vectors<Shape>(layer, vectors, thread);
  });
  // Steps that have begun to arrive, and how many shall have: at first none where the vectors are to lie.
  int begun = 0, wanted = int(lesser(16u * layer.vectors_at / layer.stage_bytes, uint32_t(stages)));
  int begin_stage = 0, stage = -1;
  for (int n = -1;;) {  // the step whose sums lie in `parts`
    block.all([&](int thread) {
      int to = begin_stage;
      BSSN_UNROLL_BY(1)
      for (int j = begun; j < wanted; ++j) {
        const uint32_t from = first + uint32_t(j * of_step);
        if (j < steps) {
          const int rows = int(lesser(end - from, uint32_t(of_step)));
          begin_rows<W, 4>(layer, from, rows, area + uint32_t(to) * layer.stage_bytes, thread);
        }
        block.commit_copies();
        to = to + 1 == stages ? 0 : to + 1;
      }
    });
    const bool is_late = n + 1 >= begun;  // the next step: no barrier has waited for it
    begin_stage += wanted - begun;
    begin_stage -= begin_stage < stages ? 0 : stages;
    begun = wanted;
    const auto parts_of = [&](int warp) { return parts + ((n & 1) * (kThreads / 32) + warp) * kWarpNumbers; };
    // Calls f(row in shared memory, a) for the rows of a thread's group.
    const auto for_rows = [&](int thread, auto f) {
      const RowThread<Shape>& my = registers[thread];
      const W* const staged = reinterpret_cast<const W*>(area + uint32_t(stage) * layer.stage_bytes);
      BSSN_UNROLL
      for (int a = 0; a < kRows; ++a) {
        const int row = my.group + a * groups;
        const uint32_t o = first + uint32_t(n * of_step + row);
        if (my.group < groups && o < end) f(staged + row * layer.row(), o, a);
      }
    };
    if (n >= 0) {
      block.template sum_warps<kRows, Shape::kNumbers, Shape::kClasses>(
          layer.row_warps, [&](int thread) { return registers[thread].first_warp; }, parts_of,
          [&](int thread) { return registers[thread].sums; });
      block.all([&](int thread) {
        const RowThread<Shape>& my = registers[thread];
        if (my.leads() && my.group < groups) {
          write_sums<Shape>(layer, first + uint32_t(n * of_step + my.group), end, my, thread % 32);
        }
        for_rows(thread, [&](const W* row, uint32_t, int a) {
          if (call.update) add_to_columns<Shape>(layer, row, registers[thread], a);
        });
      });
    }
    if (++n == steps) break;
    stage = stage + 1 == stages ? 0 : stage + 1;
    if (n == 0 || is_late) {
      block.each([&](int) { block.wait_for_copies(begun - n - 1); });
    }
    if (n == 0) {
      block.each([&](int thread) { take_vectors<Shape>(layer, vectors, registers[thread]); });
    }
    block.all([&](int thread) {
      for_rows(thread, [&](const W* row, uint32_t, int a) { add_row<Shape>(layer, row, registers[thread], a); });
    });
    block.template sum_lanes<float, kRows * Shape::kNumbers, Shape::kClasses>(
        [&](int thread, float* x) {
          BSSN_UNROLL
          for (int j = 0; j < kRows * Shape::kNumbers; ++j) x[j] = registers[thread].sums[j];
        },
        parts_of);
    // Behind this barrier the sums can be read, and the next step's rows if they had begun; and if the rows are in
    // registers their place can be filled again.
    block.each([&](int) {
      if (begun > n + 1) block.wait_for_copies(begun - n - 2);
    });
    wanted = n + stages + (Shape::kKeepsRows ? 1 : 0);
  }
  block.sync();  // s and q are written, for others to know it, and the rows have been read
  if (call.update) write_row_share<Shape>(block, layer, registers, slot);
}

// How a layer's rows are taken: by power.h, by a shape of this file, or by short_rows.h. Each shape is a good part of
// the kernel's code, so they are those that many layers have.
enum RowKind : uint8_t {
  no_rows = 0,
  rows_1,
  rows_9,
  rows_16,
  rows_9_kernel_major,
  rows_9_long,  // lanes have twice as many elements
  short_rows
};

constexpr int kRowElements = 36;  // of a lane: four channels of 3x3

// Calls f with the shape of a kind.
template <class F>
BSSN_HD void with_row_shape(RowKind kind, F f) {
  switch (kind) {
    case rows_1:
      return f(RowShape<1, false, kRowElements>{});
    case rows_9:
      return f(RowShape<9, false, kRowElements>{});
    case rows_16:
      return f(RowShape<16, false, kRowElements>{});
    case rows_9_kernel_major:
      return f(RowShape<9, true, kRowElements>{});
    case rows_9_long:
      return f(RowShape<9, false, 2 * kRowElements>{});
    default:
      return;
  }
}

// One tile of any kind of rows.
template <class W, class Block>
BSSN_HD void power_row_kind(Block& block, const ForwardCall& call, const ForwardLayer& layer, uint32_t tile,
                            float* slot) {
  with_row_shape(RowKind(layer.rows),
                 [&](auto shape) { power_rows<decltype(shape), W>(block, call, layer, tile, slot); });
}

}  // namespace bssn::cuda
