"""What the ranks of the tests of sharded models run, and one process alone to compare with."""

from __future__ import annotations

import torch
import torch.distributed as dist
from distributed_runs import full
from support import vectors_of
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import bssn_fast

Result = dict[str, Tensor]
WIDTH = 10  # shards of four ranks are uneven


class Block(nn.Module):
    """Two linear layers, as in a transformer, and a convolution over what lies between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batches(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(steps, 8, 7, generator=generator))


def train(model: nn.Module, steps: int, *, rank: int = 0, world: int = 1) -> Result:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for x in batches(steps):
        x = x[rank::world]
        loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    mean = torch.stack(losses)
    if world > 1:
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    weights = {name: full(p.detach()) for name, p in model.named_parameters()}
    sigmas = {f"sigma {name}": s for name, s in bssn_fast.sigma(model).items()}
    return {"losses": mean, **vectors_of(model), **weights, **sigmas}


def alone(variant: str, steps: int) -> Result:
    torch.manual_seed(0)
    return train(bssn_fast.apply(Network(), variant), steps)


TENSOR_PARALLEL = {
    "embed": ColwiseParallel(output_layouts=Replicate()),
    **{f"blocks.{j}.up": ColwiseParallel() for j in range(2)},
    **{f"blocks.{j}.down": RowwiseParallel() for j in range(2)},
    "head": RowwiseParallel(input_layouts=Replicate()),
}


def tensor_parallel(variant: str, steps: int) -> Result:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(Network(), mesh, dict(TENSOR_PARALLEL))
    return train(bssn_fast.apply(model, variant), steps)
