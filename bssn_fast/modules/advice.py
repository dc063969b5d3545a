"""What users are told, once, of how their programs use a model."""

from __future__ import annotations

import warnings
from typing import Any

_CALLS_TO_WATCH = 3
"""In so many of a model's first calls in training, a layer that is used twice is noticed."""


class Advice:
    """Counts what leads to advice, for layers that are normalised together or for one that is not.

    told: what has been said; shared by those for whom once is enough.
    model_called: the model itself has been called.
    """

    def __init__(self, told: set[str] | None = None) -> None:
        self.told = set() if told is None else told
        self.model_called = False
        self._reads_alone = self._iterations = 0
        self._calls_to_watch = _CALLS_TO_WATCH

    def called(self, training: bool, iterated: bool) -> bool:
        """Count a call of the model; return whether to tell of each read of a weight in it, by `read`."""
        self.model_called = True
        self._iterations += iterated
        watch = training and self._calls_to_watch > 0
        self._calls_to_watch -= watch
        return watch

    def iterated(self) -> None:
        """Count a normalisation of a layer that takes part in no calls of a model."""
        self._iterations += 1

    def read(self, reads: set[object], key: object, norm: Any) -> None:
        """Say that a layer is used twice in a call of the model, which torch would iterate twice for.

        reads: the keys of the call's reads so far, to which this one is added.
        """
        if key not in reads:
            reads.add(key)
        elif self._calls_to_watch >= 0 and norm.training and norm.settings.like_torch:
            self._calls_to_watch = -1
            warnings.warn(
                f"bssn_fast: layer {norm.name!r} is read more than once in a call of the model. It is "
                "normalised once for the call, with one power iteration, where torch's spectral_norm makes one for "
                "each use; results differ a little until the vectors have converged. update='access' gives torch's "
                "numbers, and takes longer",
                stacklevel=4,
            )

    def alone(self, layers: int) -> None:
        """Warn if a whole model, of so many layers, is normalised layer by layer."""
        self._reads_alone += 1
        if layers > 1 and not self.model_called and "alone" not in self.told and self._reads_alone >= 2 * layers:
            self.told.add("alone")
            warnings.warn(
                "bssn_fast: the layers are normalised one by one, which is slow, because the module given to "
                "`bssn_fast.apply` is never called itself. Apply it to the module whose forward is called "
                "(`model(x)`, not `model.forward(x)`), or choose update='access' if one by one is what you want.",
                stacklevel=2,
            )

    def stand_in(self, name: str) -> None:
        """Warn where a call of the model computes with another weight than the layer's own, as a hypernetwork may.

        The call has normalised the layer's own weight, which the vectors then belong to: in evaluation for certain.
        """
        if "stand_in" not in self.told:
            self.told.add("stand_in")
            warnings.warn(
                f"bssn_fast: in a call of the model, layer {name!r} is used with another weight than its own, as in a "
                "torch.func.functional_call. Both are normalised with the same vectors, which follow the layer's own "
                "weight too: if the two are unlike, sigma of the other one is too small. With update='access' the "
                "vectors follow the weight in use alone, as torch's do",
                stacklevel=2,
            )

    def unknown(self) -> None:
        """Warn where a backward pass asks for weights and it is not known which forward's are meant.

        Not for checkpoints and functions of autograd, which are known by their own object, but for hooks and whatever
        else calls the model there. Any forward since the last such pass may be meant, also one whose own backward pass
        is over: with one forward there is no doubt, with more there is.
        """
        several, self._iterations = self._iterations > 1, 0
        if several and "unknown" not in self.told:
            self.told.add("unknown")
            warnings.warn(
                "bssn_fast: a backward pass computes with the model again, outside of torch.utils.checkpoint, after "
                "several forwards. It uses the vectors as they are now, which are those of the latest forward. Run the "
                "forwards in `with bssn_fast.cached(model):` to have all use the same",
                stacklevel=2,
            )
