"""What the ranks of the tests of pipeline parallelism run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.pipelining import PipelineStage
from torch.nn.utils import parametrizations

import bssn_fast


def stage(number: int, update: str) -> nn.Module:
    """Return a part of a model that carries torch's spectral norms or, with an `update`, ours in their state."""
    torch.manual_seed(number)
    module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    for j in (0, 2):
        parametrizations.spectral_norm(module[j])
    return bssn_fast.apply(module, "sn", update=update) if update else module


def train(schedule: str, update: str) -> dict[str, Tensor]:
    """Train by one of torch's schedules; return the state of this rank's stages."""
    rank, world = dist.get_rank(), dist.get_world_size()
    several = "Interleaved" in schedule
    modules = [stage(rank + world * j, update) for j in range(2 if several else 1)]
    n = world * len(modules)
    stages = [PipelineStage(m, rank + world * j, n, torch.device("cpu")) for j, m in enumerate(modules)]
    kind = getattr(pipelining, schedule)
    run = kind(stages if several else stages[0], n_microbatches=4, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.SGD([p for m in modules for p in m.parameters()], lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x, target = torch.randn(2, 8, 8, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        run.step(*([x] if rank == 0 else []), **({"target": target} if rank == world - 1 else {}))
        optimizer.step()
    return {f"{j}.{name}": t.detach().clone() for j, m in enumerate(modules) for name, t in m.state_dict().items()}
