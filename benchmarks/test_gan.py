"""Whole training steps with no normalisation, with torch's and with ours."""

from __future__ import annotations

from benchmarks import gan, machine


def test_step(benchmark, discriminator: str, normalization: tuple[str, str], device: str, quick: bool) -> None:
    width, batch = (8, 2) if quick else (None, 64 if device == "cuda" else 8)
    step = gan.GanStep(gan.discriminators(discriminator, device, width)[normalization], batch, device, width or 64)
    benchmark.group = f"{discriminator} discriminator, batch {batch}"
    benchmark.pedantic(step, rounds=1 if quick else 5, warmup_rounds=1)
    variant, peer = normalization
    benchmark.extra_info |= {**machine.describe(device), "variant": variant, "peer": peer, "batch": batch}
