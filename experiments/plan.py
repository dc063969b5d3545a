"""Which trainings are run, and how large they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import NamedTuple

from gan.training import Settings

SQRT2 = sqrt(2)
NO_NORM = "none"
VARIANTS = ("sn", "ssn", "bsn", "bssn")
NORMS = (NO_NORM, *VARIANTS)
DEPTHS = {"paper-shallow": 4, "paper": 8, "paper-deep": 16}
"""Layers of the discriminator by network, at size 32."""
BASE = Settings(
    data="mnist",
    network="paper",
    size=32,
    width=8,
    batch=16,
    lr_generator=2e-3,
    lr_discriminator=2e-3,
    beta1=0.5,
    beta2=0.999,
    ema_decay=0.98,
)
"""The paper's networks at an eighth of their width, its loss (hinge) and betas; twenty times its learning rate."""


class Case(NamedTuple):
    """A normalisation with its scale; None where it has none, or its default."""

    norm: str
    scale: float | None = None


@dataclass(frozen=True)
class Trial:
    """One training, what it belongs to, and how often its layers are looked at."""

    study: str
    settings: Settings
    steps: int
    log_every: int
    scored: bool = True
    """Whether its samples are compared with the real images, which takes some seconds."""

    @property
    def key(self) -> str:
        """A name that no trial with other settings has."""
        s = self.settings
        scale = f"{s.scale:.3g}" if s.norm in ("ssn", "bssn") else "1"
        rates = f"g{s.lr_generator:g}-d{s.lr_discriminator:g}-n{s.critic_steps}-{s.beta1:g}-{s.beta2:g}"
        shape = f"{s.network}-{s.size}-w{s.width}-b{s.batch}-{self.steps}"
        return f"{s.data.replace('/', '_')}-{s.norm}-c{scale}-{rates}-{shape}-s{s.seed}"


@dataclass(frozen=True)
class Profile:
    """The sizes of everything."""

    base: Settings = BASE
    steps: int = 500
    log_every: int = 25
    seeds: int = 5
    others: Mapping[str, int] = field(default_factory=lambda: {"photos": 500, "emoji": 1500})
    """Other images than the base's, for claim 5 only, and the steps of their trainings."""
    scales: tuple[float, ...] = (0.7, 2.0, 4.0)
    """Of SSN and BSSN, besides the default; 1 is SN and BSN."""
    rates: tuple[float, ...] = (0.016, 0.128)
    """Learning rates of both networks, besides the base's."""
    critic: tuple[int, float] | None = None
    """Steps of the discriminator for one of the generator, and beta2 with them."""
    depth_data: str = "emoji"
    depth_steps: int = 40
    """Of trainings at several depths and at explosive rates, of which only gradients are looked at."""
    explosive: tuple[float, ...] = (0.016, 0.128, 1.0)
    """Learning rates of short trainings: up to where something explodes."""
    extreme: tuple[Case, ...] = (Case("bssn", 0.3), Case("bssn", 4.0))
    """Cases that are trained at each depth beside all variants."""

    def trial(self, study: str, case: Case, seed: int, **changes: object) -> Trial:
        scale = {} if case.scale is None else {"scale": case.scale}
        settings = replace(self.base, norm=case.norm, seed=seed, **scale, **changes)
        return Trial(study, settings, self.others.get(settings.data, self.steps), self.log_every)

    def variants(self, data: str) -> Iterator[Trial]:
        """Yield no normalisation and the four variants: claims 2 and 5."""
        for seed in range(self.seeds):
            for norm in NORMS:
                yield self.trial("variants", Case(norm), seed, data=data)

    def short(self, study: str, case: Case, seed: int, **changes: object) -> Trial:
        whole = self.trial(study, case, seed, data=self.depth_data, **changes)
        return replace(whole, steps=self.depth_steps, log_every=max(1, self.depth_steps // 8), scored=False)

    def depths(self) -> Iterator[Trial]:
        """Yield the trainings at several depths: claim 1."""
        for seed in range(self.seeds):
            for network in DEPTHS:
                for case in (*map(Case, NORMS), *self.extreme):
                    yield self.short("depth", case, seed, network=network)

    def explosions(self) -> Iterator[Trial]:
        """Yield short trainings at high learning rates, at the paper's depth: claim 1."""
        for seed in range(self.seeds):
            for rate in self.explosive:
                for norm in NORMS:
                    yield self.short("explosion", Case(norm), seed, lr_generator=rate, lr_discriminator=rate)

    def rated(self, rate: float) -> Iterator[Trial]:
        """Yield all variants at another learning rate: claims 1 and 4."""
        for seed in range(self.seeds):
            for norm in NORMS:
                yield self.trial("rates", Case(norm), seed, lr_generator=rate, lr_discriminator=rate)

    def criticised(self, steps: int, beta2: float) -> Iterator[Trial]:
        """Yield all variants with more steps of the discriminator: claim 4."""
        for seed in range(self.seeds):
            for norm in NORMS:
                yield self.trial("critic", Case(norm), seed, critic_steps=steps, beta2=beta2)

    def scaled(self, scale: float) -> Iterator[Trial]:
        """Yield SSN and BSSN with another scale than the default: claim 4."""
        for seed in range(self.seeds):
            for norm in ("ssn", "bssn"):
                yield self.trial("scales", Case(norm, scale), seed)

    def trials(self) -> list[Trial]:
        """Return all trials, study by study: whoever stops early has whole ones, each with all its seeds."""
        return [
            *self.variants(self.base.data),
            *self.depths(),
            *self.explosions(),
            *(trial for rate in self.rates for trial in self.rated(rate)),
            *(trial for scale in self.scales for trial in self.scaled(scale)),
            *(trial for data in self.others for trial in self.variants(data)),
            *(self.criticised(*self.critic) if self.critic else ()),
        ]


CPU = Profile()
QUICK = Profile(
    base=replace(BASE, width=4),
    steps=6,
    log_every=3,
    seeds=2,
    others={},
    scales=(4.0,),
    rates=(0.128,),
    explosive=(1.0,),
    depth_steps=3,
)
GPU = Profile(
    base=replace(
        BASE,
        data="emoji",
        width=64,
        batch=64,
        noise_dim=128,
        lr_generator=1e-4,
        lr_discriminator=1e-4,
        ema_decay=0.999,
    ),
    steps=5000,
    log_every=250,
    others={},
    scales=(2.0,),
    rates=(1e-3,),
    critic=(5, 0.9),
    explosive=(),
    depth_steps=1000,
)
"""The paper's network in full, with its learning rate and betas; its trainings are eighty times as long."""
