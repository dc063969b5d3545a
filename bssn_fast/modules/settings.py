"""What a layer is told: its variant, its law, and how it is computed."""

from __future__ import annotations

from typing import NamedTuple

from bssn_fast.laws import AT_MOST, CONSTANT, Law

VARIANTS = {
    # name: (both directions, multiplied by a constant)
    "sn": (False, False),
    "ssn": (False, True),
    "bsn": (True, False),
    "bssn": (True, True),
}


class Settings(NamedTuple):
    """What `apply` was told for a layer; its arguments' meanings are documented there."""

    variant: str
    scale: float
    eps: float
    n_power_iterations: int
    update: str
    backend: str
    gradient_groups: int
    sharded: str = "auto"
    kind: int = CONSTANT
    """Of the law (laws.py), whose number is the scale."""

    @property
    def law(self) -> Law:
        return Law(self.kind, self.scale)

    @property
    def like_torch(self) -> bool:
        """Whether the weight is that of torch's spectral norm."""
        return self.variant == "sn" and self.kind == CONSTANT

    def shown(self) -> str:
        """Return the variant with its law, for tables."""
        if self.kind != CONSTANT:
            sides = "bsn" if VARIANTS[self.variant][0] else "sn"
            return f"{sides} at most {self.scale:.4g}" if self.kind == AT_MOST else f"{sides} x learned gain"
        return f"{self.variant} x {self.scale:.4g}" if VARIANTS[self.variant][1] else self.variant
