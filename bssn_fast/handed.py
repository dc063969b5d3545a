"""What users write into the result of `layer.weight`, as in `torch.nn.init.normal_(layer.weight)`, becomes the weight.

A result that is made outside a call of the model is remembered until anyone looks at the layer again.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bssn_fast.plain import in_transform
from bssn_fast.plan import Fingerprint, fingerprint_of, version


class _Member(Protocol):
    def adopt(self, weight: Tensor, value: Tensor) -> None: ...


class _Result(NamedTuple):
    member: weakref.ref[Any]
    weight: Tensor
    weight_version: int
    result: Tensor
    version: int
    fingerprint: Fingerprint | None  # for writes through `.data`, which leave the version alone

    def written(self) -> bool:
        """Whether someone has written into the result. With gradients torch refuses to, as the result is a view."""
        unchanged = version(self.result) == self.version
        return not (unchanged and (self.fingerprint is None or self.fingerprint.unchanged()))


class _Latest(threading.local):
    """The latest results in each thread: two, as in `layer.weight.data.copy_(f(layer.weight))`, as they hold memory."""

    results: tuple[_Result, ...] = ()


_latest = _Latest()


def remember(member: _Member, weight: Tensor, result: Tensor) -> None:
    """Watch a result that is given away."""
    if not torch.compiler.is_compiling() and not in_transform():
        alias = result.detach()  # shares memory and version, but keeps no graph alive
        latest = _Result(weakref.ref(member), weight, version(weight), alias, version(alias), fingerprint_of(alias))
        _latest.results = (*_latest.results[-1:], latest)


def settle(*, forget: bool = False) -> None:
    """Make what was written into the latest results the weights of their layers.

    forget: the results are not watched any longer.

    Raises RuntimeError if the weight before normalisation has been written to as well.
    """
    if torch.compiler.is_compiling() or not _latest.results:
        return
    latest, _latest.results = _latest.results, ()
    written = {id(r.weight): r for r in latest if r.written()}  # the last one, of those that share memory
    for r in written.values():
        member = r.member()
        if member is None:
            continue
        if version(r.weight) != r.weight_version:
            raise RuntimeError(
                f"bssn_fast: a normalised weight of shape {tuple(r.result.shape)} was written to in place, and the "
                "weight before normalisation too; only one of them can count. Write to `layer.weight` alone"
            )
        member.adopt(r.weight, r.result)
    if not forget:
        _latest.results = tuple([r for r in latest if id(r.weight) not in written and r.member() is not None])


def settle_before_looks(kind: Any) -> None:
    """Let all ways to a layer's parameters settle first; kind is the class that parametrize made for the layer."""
    if "parametrizations" in vars(kind):
        return

    def parametrizations(self: nn.Module) -> Any:
        settle()
        return self._modules["parametrizations"]

    for name in ("named_modules", "state_dict", "_apply", "__deepcopy__"):
        setattr(kind, name, _settling(getattr(kind, name)))
    kind.parametrizations = property(parametrizations)


def _settling(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def settled(*args: Any, **kwargs: Any) -> Any:
        settle()
        return method(*args, **kwargs)

    return settled
