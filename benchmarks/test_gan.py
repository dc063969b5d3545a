"""Whole training steps with no normalisation, with torch's and with ours."""

from __future__ import annotations

from benchmarks import gan
from benchmarks.clock import EventTimer, clock_for
from benchmarks.record import Record
from benchmarks.results import Results


def test_step(
    benchmark,
    discriminator: str,
    normalization: tuple[str, str],
    device: str,
    quick: bool,
    timer: EventTimer,
    results: Results,
) -> None:
    width, batch = (8, 2) if quick else (None, gan.batch_size(device))
    model = gan.discriminators(discriminator, device, width)[normalization]
    step = gan.GanStep(model, batch, device, width or 64)
    clock = clock_for(device)
    setup = (lambda: timer.prepare(clock)) if device == "cuda" else None
    benchmark.group = f"{discriminator} discriminator, batch {batch}"
    benchmark.pedantic(step, setup=setup, rounds=1 if quick else 5, warmup_rounds=1)
    if benchmark.stats is not None:
        variant, peer = normalization
        record = Record(
            "gan", f"{discriminator}, batch {batch}", variant, peer, "step", len(gan.weight_layers(model)), 0.0
        )
        record.fill(benchmark.stats.stats.data)
        plain = results.find("gan", record.set, gan.NONE, gan.NONE, "step")
        record.added = 100 * (record.median / plain.median - 1) if plain else 0.0
        results.merge_phase(record)
        benchmark.extra_info |= {**results.machine, **record.to_dict(), "batch": batch}
