// Rows that stay in shared memory from the power iteration to the write, so that they are read once.
//
// A block keeps the last rows of its power tile while it goes on with tickets that leave shared memory alone. Before
// one that does not, and at the end, it writes what it has kept: see kept.h.
#pragma once

#include "kept.h"
#include "scaling.h"
#include "staging.h"

namespace bssn::cuda {

BSSN_HD uint32_t* claim_of(const ForwardCall& call, const ForwardLayer& layer, uint32_t tile) {
  return call.counters + layer.claims + tile;
}

// The rows of a power tile, in steps, and which steps stay.
template <class W>
struct KeptRows {
  uint32_t first, end;  // output channels
  int of_step, steps, stages, lost;

  KeptRows() = default;
  BSSN_HD KeptRows(const ForwardLayer& layer, uint32_t tile)
      : first(layer.first_channel(tile)),
        end(layer.end_channel(tile)),
        of_step(int(layer.stage_bytes / (uint32_t(layer.row()) * sizeof(W)))),
        steps((int(end - first) + of_step - 1) / of_step),
        stages(layer.stages),
        lost(layer.lost_stages) {}

  BSSN_HD bool has(int step) const { return step + stages >= steps && step % stages >= lost; }
  // Steps [begin, end) in elements of the weight.
  BSSN_HD Span elements(const ForwardLayer& layer, int begin_step, int end_step) const {
    const uint32_t row = uint32_t(layer.row()), last = first + uint32_t(end_step * of_step);
    return {(first + uint32_t(begin_step * of_step)) * row, lesser(last, end) * row};
  }
  // The next steps after `step`, which moves on, that do not stay. False if there are none.
  BSSN_HD bool next_rest(const ForwardLayer& layer, int& step, Span& span) const {
    while (step < steps && has(step)) ++step;
    const int begin = step;
    while (step < steps && !has(step)) ++step;
    span = elements(layer, begin, step);
    return begin < step;
  }
};

// Writes the rows that have stayed.
template <class W, class Block>
BSSN_HD void write_kept(Block& block, const ForwardCall& call, const ForwardLayer& layer, uint32_t tile,
                        float multiplier) {
  const KeptRows<W> rows(layer, tile);
  const unsigned char* const area = block.template shared<unsigned char>(kAreaAt);
  block.each([&](int thread) {
    with_element_type(call.output_type, [&](auto element) {
      using N = decltype(element);
      BSSN_UNROLL_BY(1)
      for (int step = rows.steps > rows.stages ? rows.steps - rows.stages : 0; step < rows.steps; ++step) {
        if (!rows.has(step)) continue;
        const Span span = rows.elements(layer, step, step + 1);
        const W* const staged = reinterpret_cast<const W*>(area + uint32_t(step % rows.stages) * layer.stage_bytes);
        scale_staged(staged, static_cast<N*>(layer.output) + span.first, multiplier, span.end - span.first, thread);
      }
    });
  });
}

// Whether a ticket is nothing for a block that keeps rows of a layer: its tile needs the shared memory, or is to write
// that layer or a later one. The write of earlier layers fills the time until this one's record is there.
template <class Args>
BSSN_HD bool ends_keeping(const Args& args, uint32_t ticket, int kept_layer) {
  if (ticket >= args.call.end_ticket) return true;
  const Segment segment = segment_of(args.segments, args.call.n_segments, ticket);
  if (segment.phase() == write) return segment.layer() >= kept_layer;
  return segment.phase() == power || args.layers[segment.layer()].stage_bytes == 0;
}

// Before a ticket, or at the end: writes what is kept, or drops it.
template <class W, class Block, class Args>
BSSN_HD void finish_kept(Block& block, const Args& args, uint32_t ticket) {
  const ForwardCall& call = args.call;
  const Kept kept = what_is_kept(block);
  const int index = int(kept.layer) - 1;
  if (index < 0 || (kept.record_at == 0 && !ends_keeping(args, ticket, index))) return;
  const ForwardLayer& layer = args.layers[index];
  const Record* record = call.records + index;
  bool has_record = true;
  if (kept.record_at > 0) {
    record = block.template shared<Record>(kept.record_at);
  } else {
    has_record = get_record(block, ticket, layer.reduced_by, counter_of(call.counters, index, recorded),
                            claim_of(call, layer, kept.tile));
  }
  if (has_record) write_kept<W>(block, call, layer, kept.tile, record->multiplier);
  block.sync();  // all have read what is kept
  keep_nothing(block);
}

}  // namespace bssn::cuda
