"""What users write into the result of `layer.weight`, as in `torch.nn.init.normal_(layer.weight)`.

Before anything has been computed with the layer it is an initialisation, and becomes the weight. Later it is refused:
an increment, as of `layer.weight.data += d`, would be one of the normalised weight. Results are looked after when they
were made outside of all calls of modules, until a model is called or somebody looks at the layer.
"""

from __future__ import annotations

import functools
import itertools
import sys
import weakref
from collections.abc import Callable, Container
from types import FrameType
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from bssn_fast.calls.composite import wants_plain_operations
from bssn_fast.calls.contents import contents_of, version
from bssn_fast.layout import has_its_memory


class _Member(Protocol):
    name: str
    used: bool

    def adopt(self, weight: Tensor, value: Tensor) -> None: ...


class _Result(NamedTuple):
    """A result that somebody may write into, and what it was when it was given away."""

    member: weakref.ref[Any]
    layer: weakref.ref[Any]  # dead once the parametrization has been taken off
    initialising: bool  # the layer has not been used, or the reader is its `reset_parameters`
    weight: Tensor
    weight_version: int
    result: Tensor
    kind: tuple[torch.Size, torch.dtype, torch.device]
    strides: tuple[int, ...]
    contents: bytes | Tensor
    earlier: Any  # the contents that the last read before gave, if the weight has been the same since
    sharers: int  # of the memory

    def held(self) -> bool:
        """Whether somebody else still has the result, or a tensor or array that shares its memory."""
        return sys.getrefcount(self.result) > 2 or _sharers(self.result) > self.sharers

    def may_be_adopted(self) -> bool:
        """Whether what is written into the result can only be meant to be the weight."""
        return (
            self.initialising and version(self.weight) == self.weight_version and self.result.shape == self.weight.shape
        )

    def written(self) -> bool:
        """Whether someone has written into the result. With gradients torch refuses to, as the result is a view.

        The same values elsewhere or in another memory format are no write, nor are those of the read before: they are
        what `torch.nn.utils.convert_conv2d_weight_memory_format` leaves.
        """
        result = self.result.detach()
        if not has_its_memory(result):
            return False  # freed, by whoever moves weights to and fro
        if (result.shape, result.dtype, result.device) != self.kind:
            return True
        if isinstance(self.contents, Tensor):
            return not any(torch.equal(known, result) for known in (self.contents, self.earlier) if known is not None)
        if result.stride() != self.strides:
            result = torch.empty_strided(result.shape, self.strides, dtype=result.dtype).copy_(result)
        return contents_of([result]) not in (self.contents, self.earlier)


_watched: dict[int, _Result] = {}  # by the order in which they were given away
_numbers = itertools.count()
_latest: weakref.WeakKeyDictionary[Any, tuple[Any, bytes | Tensor]] = weakref.WeakKeyDictionary()
"""What the weight was, and the contents of the result, at the last read of each member, until a model is called."""


def _sharers(tensor: Tensor) -> int:
    if not hasattr(torch._C, "_storage_Use_Count"):
        return 0
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def watch(member: _Member, layer: object, weight: Tensor, result: Tensor) -> None:
    """Look after a result that is given away outside of all calls."""
    if torch.compiler.is_compiling() or wants_plain_operations([weight]):
        return
    initialising = not member.used or _resetting()
    contents: bytes | Tensor | None = contents_of([result])
    if contents is None:  # on a GPU: to be compared element by element, once, when somebody looks
        contents = result.detach().clone()
    now = version(weight), weight.device
    before, earlier = _latest.get(member, (None, None))
    _latest[member] = now, contents
    _watched[next(_numbers)] = _Result(
        weakref.ref(member),
        weakref.ref(layer),
        initialising,
        weight,
        version(weight),
        result,
        (result.shape, result.dtype, result.device),
        result.stride(),
        contents,
        earlier if before == now else None,
        _sharers(result),
    )


def shares_a_result(tensor: Tensor) -> bool:
    """Whether a tensor lies in the memory of a result that is looked after."""
    if not _watched or not torch._C._has_storage(tensor):
        return False
    storage = tensor.untyped_storage()._cdata
    return any(r.result.untyped_storage()._cdata == storage for r in list(_watched.values()))


def _resetting() -> bool:
    """Whether a module's `reset_parameters` is running, which can only mean to set its weights."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "reset_parameters" and isinstance(frame.f_locals.get("self"), nn.Module):
            return True
        frame = frame.f_back
    return False


def settle(norms: Container[int] = (), *, forget: bool = False) -> None:
    """Make what was written into results, before their layers were used, the weights of these layers.

    norms: ids of the parametrizations of the layers that are looked at or about to be used.
    forget: their results are not looked after any longer.

    Raises RuntimeError for what was written into the result of one of these layers if it is in use, and where the
    weight before normalisation has been written to as well. The write counts for nothing then.
    """
    if forget and _latest:
        _latest.clear()
    if not _watched or torch.compiler.is_compiling():
        return
    latest: dict[int, _Result] = {}  # the last one, of those that share memory
    for number, result in list(_watched.items()):
        concerned = id(result.member()) in norms
        if result.layer() is not None and result.written():
            if not concerned and not result.may_be_adopted():
                continue  # its own layer will say so
            latest[id(result.weight)] = result
        elif result.layer() is not None and not (forget and concerned) and result.held():
            continue
        _watched.pop(number, None)
    for result in latest.values():
        _adopt(result)


def _adopt(result: _Result) -> None:
    member = result.member()
    if member is None:
        return
    if version(result.weight) != result.weight_version:
        raise RuntimeError(
            f"bssn_fast: {member.name}: a normalised weight of shape {tuple(result.weight.shape)} was written to in "
            "place, and the weight before normalisation too; only one of them can count. Write to `layer.weight` alone"
        )
    if not result.initialising:
        raise RuntimeError(
            f"bssn_fast: {member.name}: what `layer.weight` gave was written to in place, and the layer is in use: it "
            "is the normalised weight, and nothing tells what the weight before normalisation should be. Write into "
            "`layer.parametrizations.weight.original`, assign `layer.weight = ...`, or write into a copy "
            "(`layer.weight.clone()`). This write has changed nothing"
        )
    if result.result.shape != result.weight.shape:
        raise RuntimeError(
            f"bssn_fast: {member.name}: `layer.weight.data` was given the shape {tuple(result.result.shape)}, and the "
            f"weight has {tuple(result.weight.shape)}; call bssn_fast.remove before a weight changes shape"
        )
    member.adopt(result.weight, result.result.detach())


def settle_before_looks(kind: Any) -> None:
    """Let all ways to a layer's parameters settle first; kind is the class that parametrize made for the layer.

    And let a running call know, whose forward may write into the weight.
    """
    if "parametrizations" in vars(kind):
        return

    def parametrizations(self: nn.Module) -> Any:
        _look(self)
        return self._modules["parametrizations"]

    for name in ("named_modules", "state_dict", "_apply", "__deepcopy__"):
        setattr(kind, name, _settling(getattr(kind, name)))
    kind.parametrizations = property(parametrizations)


def _settling(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def settled(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _look(self)
        return method(self, *args, **kwargs)

    return settled


def _look(module: nn.Module) -> None:
    if torch.compiler.is_compiling():
        return
    norms: list[Any] = [norm for layer in cast(Any, module._modules["parametrizations"]).values() for norm in layer]
    if _watched:
        settle(set(map(id, norms)))
    for norm in norms:
        if hasattr(norm, "slots"):  # it is ours
            norm.looked_at()
