"""Sums over ranks: many small tensors in one message, and failures that all ranks hear of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def summed(
    sizes: Sequence[int],
    group: Any,
    like: Tensor,
    fill: Callable[[list[Tensor]], None],
    failure: Exception | None = None,
) -> list[Tensor]:
    """Return tensors [size] that are sums over the ranks of a group, the same bits on each: one all-reduce.

    fill: writes this rank's parts into zeros.
    failure: what has gone wrong on this rank, which takes part all the same, so that nobody waits for it.

    Raises the failure, or what `fill` raises, and RuntimeError on the other ranks, with its text. On a GPU, where
    looking would mean to wait, the others get NaN.
    """
    flat = torch.zeros(sum(sizes) + 1, dtype=like.dtype, device=like.device)
    *parts, failed = flat.split([*sizes, 1])
    if failure is None:
        try:
            fill(parts)
        except Exception as error:
            failure = error
    if failure is not None:
        flat.fill_(torch.nan)
    dist.all_reduce(flat, group=group)
    if failure is not None or (flat.device.type == "cpu" and not bool(failed == 0)):
        _raise_everywhere(failure, group, flat.device)
    return parts


def _raise_everywhere(failure: Exception | None, group: Any, device: torch.device) -> None:
    if device.type == "cpu":
        said: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(said, None if failure is None else f"{type(failure).__name__}: {failure}", group=group)
        if failure is None:
            rank = next(j for j, text in enumerate(said) if text is not None)
            raise RuntimeError(f"bssn_fast: rank {dist.get_global_rank(group, rank)} has failed: {said[rank]}")
    assert failure is not None
    raise failure
