"""Whole training steps with no normalisation, with torch's and with ours."""

from __future__ import annotations

from benchmarks.shown.results import Results
from benchmarks.timing.clock import EventTimer, clock_for
from benchmarks.timing.record import Record
from benchmarks.work import training_step


def test_step(
    benchmark,
    discriminator: str,
    normalization: tuple[str, str],
    device: str,
    quick: bool,
    timer: EventTimer,
    results: Results,
) -> None:
    width, batch = (8, 2) if quick else (None, training_step.batch_size(device))
    model = training_step.discriminators(discriminator, device, width)[normalization]
    step = training_step.Step(model, batch, device, width or 64)
    clock = clock_for(device)
    setup = (lambda: timer.prepare(clock)) if device == "cuda" else None
    benchmark.group = f"{discriminator} discriminator, batch {batch}"
    benchmark.pedantic(step, setup=setup, rounds=1 if quick else 5, warmup_rounds=1)
    if benchmark.stats is not None:
        variant, peer = normalization
        name, layers = f"{discriminator}, batch {batch}", len(training_step.weight_layers(model))
        record = Record("gan", name, variant, peer, "step", layers, megabytes=0.0)
        record.fill(benchmark.stats.stats.data)
        plain = results.find("gan", record.set, training_step.NONE, training_step.NONE, "step")
        record.added = 100 * (record.median / plain.median - 1) if plain else 0.0
        results.merge_phase(record)
        benchmark.extra_info |= {**results.machine, **record.to_dict(), "batch": batch}
