"""torch's selective checkpoints, which keep the results of some operations and repeat the others.

In the backward pass they find a result again by the operation's name and number. So they must not count operations that
a normalisation makes: it is not repeated where it was part of a call of the model, and not in the same way elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

from bssn_fast.calls.composite import in_mode

_COUNTING = (torch_checkpoint._CachingTorchDispatchMode, torch_checkpoint._CachedTorchDispatchMode)
_NOTHING = contextlib.nullcontext()


def uncounted() -> contextlib.AbstractContextManager[None]:
    """Return a context manager in which selective checkpoints see no operations. Other modes still do."""
    if not torch._C._len_torch_dispatch_stack() or in_mode():  # a compiler makes a graph of all operations
        return _NOTHING
    return _past_counting_modes()


@contextlib.contextmanager
def _past_counting_modes() -> Iterator[None]:
    modes = _get_current_dispatch_mode_stack()
    others = [m for m in modes if not isinstance(m, _COUNTING)]
    if len(others) == len(modes):
        yield
        return
    _replace(modes, others)
    try:
        yield
    finally:
        _replace(others, modes)


def _replace(old: list[TorchDispatchMode], new: list[TorchDispatchMode]) -> None:
    for _ in old:
        _pop_mode()
    for mode in new:
        _push_mode(mode)
