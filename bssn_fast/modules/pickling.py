"""Whole models in files and in other processes.

torch refuses to pickle parametrized modules: each has a class of its own, under whose name pickle finds nothing. A
normalised layer is pickled as one of the class that it had before, and gets a class of its own again when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from bssn_fast.modules.access import quick_access
from bssn_fast.modules.parametrization import SpectralNormalization
from bssn_fast.modules.recurrent import follow_weights


def allow_pickling(module: nn.Module) -> None:
    """Let a parametrized module be pickled, and copied by `copy.copy`."""
    kind: Any = type(module)  # the class that parametrize has made for this module alone
    if "__getstate__" in vars(kind):
        del kind.__getstate__  # which refuses
    kind.__reduce_ex__ = _reduce


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    kind: Any = type(self)
    plain = kind.__bases__[0]
    make, args, *state = plain.__reduce_ex__(self, protocol)
    if "__reduce_ex__" not in vars(kind):  # fully_shard has made a class of that one
        return make, args, *state
    ours = {name: isinstance(layer[0], SpectralNormalization) for name, layer in self.parametrizations.items()}
    return _rebuild, (make, tuple([plain if a is kind else a for a in args]), ours), *state


def _rebuild(make: Callable[..., nn.Module], args: tuple[Any, ...], ours: Mapping[str, bool]) -> nn.Module:
    """Return a module, whose attributes may still be missing, with a class as parametrize makes them.

    ours: for the name of each parametrized tensor, whether this package normalises it.
    """
    module = make(*args)
    like: Any = object.__new__(type(module))
    nn.Module.__init__(like)
    for name, quick in ours.items():
        like._parameters[name] = nn.Parameter(torch.empty(0))
        parametrize.register_parametrization(like, name, nn.Identity(), unsafe=True)
        if quick:
            quick_access(like, name)
    follow_weights(like)
    allow_pickling(like)
    module.__class__ = type(like)
    return module
