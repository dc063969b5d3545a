// The forward pass: its third phase, what a ticket stands for, and what a block does.
#pragma once

#include "cluster.h"
#include "keeping.h"
#include "rows.h"
#include "short_rows.h"

namespace bssn::cuda {

// One power tile: s and q of its channels, and to `slot` its share of t and r.
template <class W, class Block>
BSSN_HD void power_tile(Block& block, const ForwardCall& call, const ForwardLayer& layer, uint32_t tile, float* slot) {
  if (layer.rows == short_rows) {
    power_short<W>(block, call, layer, tile, slot);
  } else if (layer.rows != no_rows) {
    power_row_kind<W>(block, call, layer, tile, slot);
  } else if (layer.packed) {
    power_staged<W, kMaxPack>(block, call, layer, tile, slot);
  } else {
    power_staged<W, 1>(block, call, layer, tile, slot);
  }
}

// Elements [first, end) of vector j, every `step`-th: scaled if the power iteration gave a usable one, else what was
// stored.
BSSN_HD void write_vector(const ForwardLayer& layer, int j, const Record& record, uint32_t first, uint32_t end,
                          uint32_t step) {
  const bool usable = record.usable[j / 2];
  const float factor = record.factors[j];
  BSSN_UNROLL_BY(1)
  for (uint32_t x = first; x < end; x += step) {
    if (usable) {
      const float value = layer.snapshot[j][x] * factor;
      layer.snapshot[j][x] = layer.vectors[j][x] = value;
    } else {
      layer.snapshot[j][x] = layer.vectors[j][x];
    }
  }
}

// Writes a tile's part of the vectors and of the normalised weight: elements from tile * elements on, or where rows are
// kept those of a power tile, but what another block writes that has them.
template <class W, class Block>
BSSN_HD void write_part(Block& block, const ForwardCall& call, const ForwardLayer& layer, const Record& record,
                        uint32_t tile, uint32_t elements, bool is_kept) {
  const bool by_rows = Block::kKeeps && layer.keeps;
  block.each([&](int thread) {
    if (call.writes(layer)) {
      const uint32_t size = uint32_t(layer.c_out) * uint32_t(layer.row());
      KeptRows<W> rows;
      Span span = {lesser(tile * elements, size), lesser(tile * elements, size)};
      span.end += lesser(size - span.first, elements);
      int step = 0;
      if (by_rows) {
        rows = KeptRows<W>(layer, tile);
        if (!is_kept) rows.stages = 0;
        rows.next_rest(layer, step, span);
      }
      while (span.first < span.end) {
        with_element_type(call.output_type, [&](auto element) {
          using N = decltype(element);
          scale_elements(static_cast<const W*>(layer.weight), static_cast<N*>(layer.output), record.multiplier,
                         span.first, span.end, thread);
        });
        if (!by_rows || !rows.next_rest(layer, step, span)) break;
      }
    }
    const int sizes[4] = {layer.c_out, layer.row(), layer.c_in, layer.c_out * layer.kernel};
    const uint32_t start = tile * kThreads + uint32_t(thread), step = layer.tiles[write] * kThreads;
    BSSN_UNROLL
    for (int j = 0; j < 4; ++j) {
      if (j < 2 || layer.two_sided()) write_vector(layer, j, record, start, uint32_t(sizes[j]), step);
    }
  });
}

// A ticket's power tile: of a layer that a cluster has to itself, each block has one.
template <class W, class Block>
BSSN_HD void power_ticket(Block& block, const ForwardCall& call, const ForwardLayer& layer, int index, uint32_t tile,
                          bool is_whole) {
  if (layer.stage_bytes == 0) return power_split<W>(block, call, layer, index, tile);
  float* const slot = is_whole ? block.template shared<float>(16u * layer.slots) : call.slot(layer, tile);
  if (tile < layer.tiles[power]) {
    power_tile<W>(block, call, layer, tile, slot);
    if (Block::kKeeps && layer.keeps && call.writes(layer)) keep(block, index, tile, is_whole ? kRecordAt : 0u);
  }
  if (!is_whole) block.publish(counter_of(call.counters, index, power_done));
}

template <class W, class Block, class Args>
BSSN_HD void forward_ticket(Block& block, const Args& args, uint32_t ticket) {
  const ForwardCall& call = args.call;
  const Segment segment = segment_of(args.segments, call.n_segments, ticket);
  const int index = segment.layer(), phase = segment.phase();
  const ForwardLayer& layer = args.layers[index];
  const bool is_whole = Block::kHasClusters && phase == whole;
  const uint32_t tile = is_whole ? uint32_t(block.rank()) : ticket - segment.first;
  if (phase == reduce) return reduce_tile<W>(block, call, layer, index, tile);
  if (phase != write) power_ticket<W>(block, call, layer, index, tile, is_whole);
  if (phase != write && !is_whole) return;
  const Record* record = call.records + index;
  uint32_t elements = call.write_elements;
  bool is_kept = Block::kKeeps && layer.keeps && call.writes(layer);
  if (is_whole) {
    record = &cluster_record(block, call, layer);
    elements = (uint32_t(layer.c_out) * uint32_t(layer.row()) / kCluster + kCluster) & ~7u;
  } else {
    block.wait(counter_of(call.counters, index, recorded), 1);
    is_kept = is_kept && block.exchange(claim_of(call, layer, tile), passed) != dropped;
  }
  write_part<W>(block, call, layer, *record, tile, elements, is_kept);
  if (is_whole) block.wait_for_cluster();
}

// What a block does: first the layers that its cluster has to itself, then tickets until none is left. One loop for
// both, as a tile's code is as long as it is.
template <class W, class Block, class Args>
BSSN_HD void run_block(Block& block, const Args& args) {
  const ForwardCall& call = args.call;
  uint32_t* const counter = call.counters + call.ticket_counter;
  const bool has_tickets = call.first_ticket < call.end_ticket;
  keep_nothing(block);
  block.sync();
  uint32_t own = block.cluster();
  if (has_tickets && own >= call.whole_layers) block.ask_for_ticket(counter);
  for (;;) {
    const bool is_own = Block::kHasClusters && own < call.whole_layers;
    uint32_t ticket = own;
    if (!is_own) ticket = has_tickets ? call.first_ticket + block.hand_out_ticket() : call.end_ticket;
    if constexpr (Block::kKeeps) finish_kept<W>(block, args, ticket);
    if (!is_own && ticket >= call.end_ticket) return;
    if (!is_own) block.ask_for_ticket(counter);
    forward_ticket<W>(block, args, ticket);
    if (is_own) {
      own += block.clusters();
      if (has_tickets && own >= call.whole_layers) block.ask_for_ticket(counter);
    }
  }
}

}  // namespace bssn::cuda
