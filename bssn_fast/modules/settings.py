"""What a layer is told: its variant, its law, and how it is computed."""

from __future__ import annotations

from typing import NamedTuple

from bssn_fast.laws import AT_MOST, CONSTANT, GAIN, Law
from bssn_fast.layout import ONE, Stack

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
    scale: float | tuple[float, ...]
    eps: float
    n_power_iterations: int
    update: str
    backend: str
    gradient_groups: int
    sharded: str = "auto"
    kind: int = CONSTANT
    """Of the law (laws.py), whose number is the scale; several numbers for several matrices."""
    stack: Stack = ONE

    def laws(self) -> list[Law]:  # no property: torch 2.6's compiler knows none of a named tuple
        """Return the laws of the matrices that the weight holds."""
        numbers = self.scale if isinstance(self.scale, tuple) else (self.scale,) * self.stack.n
        return [Law(self.kind, number) for number in numbers]

    @property
    def like_torch(self) -> bool:
        """Whether the weight is that of torch's spectral norm."""
        return self.variant == "sn" and self.kind == CONSTANT and self.stack == ONE

    def shown(self) -> list[str]:
        """Return the variant with its law, for tables, of each matrix that the weight holds."""
        sides, scaled = VARIANTS[self.variant]
        if self.kind == AT_MOST:
            return [f"{'bsn' if sides else 'sn'} at most {law.number:.4g}" for law in self.laws()]
        if self.kind == GAIN:
            return [f"{'bsn' if sides else 'sn'} x learned gain"] * self.stack.n
        return [f"{self.variant} x {law.number:.4g}" if scaled else self.variant for law in self.laws()]

    def arguments(self, dim: int) -> str:
        """Return a layer's settings as its repr shows them; dim is the weight's output dimension."""
        shown = f"{self.variant!r}, dim={dim}, n_power_iterations={self.n_power_iterations}, eps={self.eps}"
        if self.stack != ONE:
            shown += f", blocks={self.stack.n}"
        scale = self.scale
        number = f"[{', '.join(f'{c:.4g}' for c in scale)}]" if isinstance(scale, tuple) else f"{scale:.4g}"
        if self.kind != CONSTANT:
            return shown + (f", at_most={number}" if self.kind == AT_MOST else ", gain='learn'")
        return f"{shown}, scale={number}" if VARIANTS[self.variant][1] else shown
