"""Which trainings are run, and how large they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt

from gan.training import Settings

SQRT2 = sqrt(2)
VARIANTS = ("sn", "ssn", "bsn", "bssn")
NO_NORM = "none"
BASE = Settings(
    network="paper", size=8, width=16, batch=32, lr_generator=2e-3, lr_discriminator=2e-3, beta1=0.5, ema_decay=0.99
)


@dataclass(frozen=True)
class Trial:
    """One training: its settings and length, and how often its samples and its layers are measured."""

    settings: Settings
    steps: int
    evaluations: int
    log_every: int

    @property
    def key(self) -> str:
        """A name that no trial with other settings has."""
        s = self.settings
        scale = f"{s.scale:.3g}" if s.norm in ("ssn", "bssn") else "1"
        rates = f"g{s.lr_generator:g}-d{s.lr_discriminator:g}-n{s.critic_steps}"
        shape = f"{s.network}-{s.size}-w{s.width}-b{s.batch}-{s.beta1:g}-{s.beta2:g}-{self.steps}"
        return f"{s.data.replace('/', '_')}-{s.norm}-c{scale}-{rates}-{shape}-s{s.seed}"


@dataclass(frozen=True)
class Profile:
    """The sizes of everything."""

    data: tuple[str, ...] = ("digits", "photos")
    """The first gets all experiments, the others each variant at the base learning rates and the default scale."""
    base: Settings = BASE
    steps: int = 1000
    rates: tuple[float, ...] = (1e-3, 4e-3)
    """The grid of learning rates, for both networks, besides the base."""
    critic_steps: int = 3
    scales: tuple[float, ...] = (0.7, 1.0, SQRT2, 2.0, 4.0)
    extreme_scale: float = 0.3
    seeds: int = 5
    grid_seeds: int = 5
    """Of trials with other learning rates or more critic steps: so many of the seeds, from the last one backwards."""
    other_seeds: int = 5
    """Of trials with other data than the first: so many of the seeds, from the first one."""
    evaluations: int = 8
    log_every: int = 50

    def trial(self, data: str, norm: str, seed: int, **changes: object) -> Trial:
        settings = replace(self.base, data=data, norm=norm, seed=seed, **changes)
        return Trial(settings, self.steps, self.evaluations, self.log_every)

    def scaled(self, data: str, norm: str, scale: float, seed: int) -> Trial:
        """Return the trial of "ssn" or "bssn" with a scale; with 1 it is that of "sn" or "bsn", the same arithmetic."""
        if scale == 1:
            return self.trial(data, norm.replace("ss", "s"), seed)
        return self.trial(data, norm, seed, scale=scale)

    def seeds_of(self, data: str, changes: Mapping[str, object]) -> range:
        """Return the seeds of the trials with these images and these changes of the base settings."""
        if data != self.data[0]:
            return range(min(self.seeds, self.other_seeds))
        if any(value != getattr(self.base, name) for name, value in changes.items()):
            return range(max(0, self.seeds - self.grid_seeds), self.seeds)
        return range(self.seeds)

    def rate_pairs(self) -> list[tuple[float, float]]:
        """Return (generator, discriminator) for all points of the grid, the base last."""
        pairs = [(g, d) for g in self.rates for d in self.rates]
        return [*pairs, (self.base.lr_generator, self.base.lr_discriminator)]

    def trials(self) -> list[Trial]:
        """Return all trials, each once: variants and scales, learning rates and critic steps, then other data.

        Within each of these all trials of a seed come before those of the next: a part of them is a smaller study.
        """
        first, *others = self.data
        found: list[Trial] = []
        for seed in range(self.seeds):
            found += [self.trial(first, norm, seed) for norm in (NO_NORM, *VARIANTS)]
            found += [self.scaled(first, norm, c, seed) for c in self.scales for norm in ("ssn", "bssn")]
            found.append(self.scaled(first, "bssn", self.extreme_scale, seed))
        for seed in self.seeds_of(first, {"critic_steps": 0}):
            for g, d in self.rate_pairs():
                found += [self.trial(first, norm, seed, lr_generator=g, lr_discriminator=d) for norm in VARIANTS]
            found += [self.trial(first, norm, seed, critic_steps=self.critic_steps) for norm in VARIANTS]
        for data in others:
            found += [self.trial(data, norm, seed) for seed in self.seeds_of(data, {}) for norm in (NO_NORM, *VARIANTS)]
        return list({trial.key: trial for trial in found}.values())


CPU = Profile()
QUICK = Profile(steps=40, seeds=2, scales=(0.7, 1.0, SQRT2, 4.0), rates=(1e-3,), evaluations=2, log_every=20)
GPU = Profile(
    data=("cifar10",),
    base=Settings(
        network="paper",
        size=32,
        width=64,
        batch=64,
        noise_dim=128,
        lr_generator=1e-4,
        lr_discriminator=1e-4,
        beta1=0.5,
        beta2=0.999,
        ema_decay=0.9999,
    ),
    steps=100_000,
    rates=(1e-4, 2e-4),
    critic_steps=5,
    evaluations=20,
    log_every=1000,
)
"""The paper's CNN and learning rates; its trainings are four times as long."""
