"""RNN, LSTM and GRU keep a list of their weights, which would go on to hold those before normalisation."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

_running = threading.local()
"""`lists`: for each recurrent module whose forward runs in this thread, by id, the weights that it uses."""


def follow_weights(module: nn.Module) -> None:
    """Let a parametrized recurrent module compute with what its attributes give: each is read once a forward."""
    if not isinstance(module, nn.RNNBase):
        return
    kind: Any = type(module)  # the class that parametrize has made for this module alone
    plain: Any = kind.__bases__[0]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        lists = vars(_running).setdefault("lists", {})
        lists[id(self)] = [getattr(self, name, None) for name in self._flat_weights_names]
        try:
            return plain.forward(self, *args, **kwargs)
        finally:
            del lists[id(self)]

    def flat_weights(self: Any) -> list[Tensor | None]:
        found: list[Tensor | None] | None = vars(_running).get("lists", {}).get(id(self))
        return [_original(self, name) for name in self._flat_weights_names] if found is None else found

    kind.forward = forward
    kind._flat_weights = property(flat_weights, lambda self, value: None)
    # The list is never out of date, and results of a normalisation must not be moved to another place.
    kind._weights_have_changed = lambda self: False
    kind._init_flat_weights = kind.flatten_parameters = lambda self: None


def forget_weights(module: nn.Module) -> None:
    """Let a recurrent module without parametrizations keep its own list again."""
    if isinstance(module, nn.RNNBase) and not parametrize.is_parametrized(module):
        module._init_flat_weights()


def _original(module: Any, name: str) -> Tensor | None:
    if parametrize.is_parametrized(module, name):
        return getattr(module.parametrizations[name], "original", None)
    return getattr(module, name, None)
