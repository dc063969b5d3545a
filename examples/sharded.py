"""One small transformer trained in each of torch's ways to divide a model among processes, to the same losses.

python examples/sharded.py

Starts four processes on this machine's CPU, joined by gloo. On GPUs the same code runs under torchrun, with "cuda" for
the meshes and nccl for the process group. docs/howto/distributed.md has the recipes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import bssn_fast

RANKS, STEPS, BATCH, WIDTH = 4, 20, 16, 32


class Block(nn.Module):
    """The feed-forward half of a transformer's block, a quarter of which each rank has under tensor parallelism."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


Way = Callable[[], tuple[nn.Module, int]]
"""Returns the model, and among how many ranks each batch is divided; the others of a row of the mesh share theirs."""


def one_process() -> tuple[nn.Module, int]:
    return bssn_fast.apply(Network(), "bssn"), 1


def ddp() -> tuple[nn.Module, int]:
    return DistributedDataParallel(bssn_fast.apply(Network(), "bssn")), RANKS


def fsdp2(**options: object) -> tuple[nn.Module, int]:
    model = bssn_fast.apply(Network(), "bssn")
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options), RANKS


def fsdp2_bf16() -> tuple[nn.Module, int]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return fsdp2(mp_policy=policy)


PLAN = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}


def tensor_parallel() -> tuple[nn.Module, int]:
    """Divide the weights first, normalise them then: each rank keeps and scales its own part."""
    model = parallelize_module(Network(), init_device_mesh("cpu", (RANKS,)), dict(PLAN))
    return bssn_fast.apply(model, "bssn"), 1


def two_dimensions() -> tuple[nn.Module, int]:
    """Tensor parallelism, normalisation, FSDP2: in this order."""
    mesh = init_device_mesh("cpu", (RANKS // 2, 2), mesh_dim_names=("data", "tensor"))
    model = bssn_fast.apply(parallelize_module(Network(), mesh["tensor"], dict(PLAN)), "bssn")
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"]), RANKS // 2


WAYS: dict[str, Way] = {
    "one process": one_process,
    "DDP": ddp,
    "FSDP2": fsdp2,
    "FSDP2, bfloat16": fsdp2_bf16,
    "tensor parallel": tensor_parallel,
    "FSDP2 and tensor parallel": two_dimensions,
}


def train(way: Way) -> Tensor:
    """Return the loss of each step, of the whole batch."""
    torch.manual_seed(0)  # the same weights and vectors on all ranks
    model, parts = way()
    part = dist.get_rank() * parts // RANKS
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        x = torch.randn(BATCH, WIDTH, generator=generator)[part::parts]
        loss = mse_loss(model(x).float(), x.sin())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    found = torch.stack(losses)
    dist.all_reduce(found)
    return found / RANKS


def run(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    expected = None
    for name, way in WAYS.items():
        losses = train(way)
        expected = losses if expected is None else expected
        difference = float((losses - expected).abs().max())
        assert difference < (0.02 if "bfloat16" in name else 1e-5), f"{name}: {losses} and not {expected}"
        if rank == 0:
            print(f"{name:26} loss {losses[0]:.4f} to {losses[-1]:.4f}, off by {difference:.1e} at most", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(run, (port,), nprocs=RANKS)


if __name__ == "__main__":
    main()
