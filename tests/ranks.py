"""Processes of a torch.distributed group on this machine, which run functions for the tests."""

from __future__ import annotations

import datetime
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
_PATIENCE = 120  # seconds, for starting and for each function

FSDP2_ON_CPUS = hasattr(torch.cpu.Stream, "record_event")
WITHOUT_FSDP2 = "torch 2.6 runs fully_shard on GPUs alone"
"""The reason for skipping tests where FSDP2_ON_CPUS is false."""
THIRD_DERIVATIVES = torch.__version__ >= (2, 7)
"""Whether DTensors have them: torch 2.6's lose parts of sums, without this package too."""


class Ranks:
    """Processes, joined by gloo, that wait for functions."""

    def __init__(self, folder: Path, world: int = WORLD) -> None:
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, str(folder / "store"), theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function of an importable module on all ranks; return what each returned, or raise what one raised.

        A torch that cannot run fully_shard here skips the test.
        """
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        replies = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(_PATIENCE), f"rank {rank} does not answer"
            replies.append(pickle.loads(pipe.recv_bytes()))
        if not FSDP2_ON_CPUS and any(failure and "_fully_shard" in failure for failure, _ in replies):
            pytest.skip(WITHOUT_FSDP2)
        for rank, (failure, _) in enumerate(replies):
            assert failure is None, f"on rank {rank}:\n{failure}"
        return [result for _, result in replies]

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.join(10)
            process.kill()


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=_PATIENCE / 2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the tests are over
            break
        failure, result = None, None
        try:
            result = function(*args)
        except Exception:
            failure = traceback.format_exc()
        pipe.send_bytes(pickle.dumps((failure, result)))
    dist.destroy_process_group()
