"""What the ranks of the tests of sharded models run, and one process alone to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from distributed_runs import full
from support import vectors_of
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for x in batches(steps):
        x = x[rank::world]
        loss = (model(x) - x.sin().mean(1, keepdim=True)).square().mean()
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


def seeds(steps: int, ranks: bool) -> Result:
    """Ranks that draw other first vectors, and whose vectors someone has made differ before the first use."""
    torch.manual_seed(0)
    model: nn.Module = Network()
    if ranks:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parallelize_module(model, mesh, dict(TENSOR_PARALLEL))
    rank = dist.get_rank() if ranks else 0
    torch.manual_seed(rank)
    bssn_fast.apply(model)
    before = torch.cat(list(vectors_of(model).values()))
    with torch.no_grad():
        for name, vector in model.named_buffers():
            if name.startswith("head") or rank > 0:
                vector.copy_(nn.functional.normalize(torch.randn_like(vector), dim=0))
    evaluated = model.eval()(batches(1)[0]).detach()
    return {"evaluated": evaluated, "before": before, **train(model.train(), steps)}


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


def laws(steps: int, ranks: bool) -> Result:
    """Constants and upper bounds of single layers, one of them slack."""
    torch.manual_seed(0)
    model: nn.Module = Network()
    if ranks:
        parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), dict(TENSOR_PARALLEL))
    bounds = {"blocks.0.up": 0.4, "blocks.1.down": 50.0}
    bssn_fast.apply(model, "bssn", scale={"embed": 1.3, "blocks.0.down": 0.7}, at_most=bounds)
    return train(model, steps)


class Mixed(nn.Module):
    """Layers of all kinds, whose forward works with any sharding: it gathers the normalised weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 7, 3, bias=False)
        self.back = nn.ConvTranspose2d(3, 6, 3, bias=False)
        self.grouped = nn.Conv1d(6, 4, 2, groups=2, bias=False)
        self.linear = nn.Linear(9, 3, bias=False)
        self.table = nn.Embedding(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for j, layer in enumerate(self.children()):
            whole = full_tensor(layer.weight)
            probe = torch.linspace(-1, 1, whole.numel()).add(j).sin().view_as(whole)
            total = total + (whole - probe / probe.norm()).square().sum()
        return total * x.mean() / 30


def full_tensor(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


LAYOUTS = {
    2: {
        "rows": ((2,), [Shard(0)]),
        "columns": ((2,), [Shard(1)]),
        "replicated": ((2,), [Replicate()]),
    },
    4: {
        "uneven rows, some empty": ((4,), [Shard(0)]),
        "uneven columns, some empty": ((4,), [Shard(1)]),
        "rows and columns": ((2, 2), [Shard(0), Shard(1)]),
        "columns and rows": ((2, 2), [Shard(1), Shard(0)]),
        "rows twice": ((2, 2), [Shard(0), Shard(0)]),
        "replicas of columns": ((2, 2), [Replicate(), Shard(1)]),
        "rows of replicas": ((2, 2), [Shard(0), Replicate()]),
        "kernel positions": ((2, 2), [Shard(-1), Shard(0)]),
    },
}


def steps_of(model: nn.Module, steps: int) -> Result:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(steps):
        loss = model(torch.ones(3) + step / 100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    found = {"losses": torch.stack(losses), **vectors_of(model)}
    for name, p in model.named_parameters():
        found[name], found[f"gradient {name}"] = full(p.detach()), full(p.grad)
    model.eval()
    found["evaluated"] = model(torch.ones(3)).detach()
    return found | {f"sigma {name}": s for name, s in bssn_fast.sigma(model).items()}


def layout_alone(variant: str, steps: int) -> Result:
    torch.manual_seed(0)
    return steps_of(bssn_fast.apply(Mixed(), variant), steps)


def layout(name: str, variant: str, steps: int) -> Result:
    shape, placements = LAYOUTS[dist.get_world_size()][name]
    mesh = init_device_mesh("cpu", shape)
    torch.manual_seed(0)
    model = Mixed()
    for layer in model.children():
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, placements))
    return steps_of(bssn_fast.apply(model, variant), steps)


def sharded_network(variant: str, how: str, blocks: bool, n: int = 1, **options: object) -> tuple[nn.Module, int, int]:
    """Return a network, and which part of each batch this rank takes: the number of the part, and of how many.

    variant: empty for a network that is not normalised.
    how: "fsdp", "hybrid" (in groups of replicas) or "tensor" (and FSDP), and what `apply` is told to do.
    """
    torch.manual_seed(0)
    world = dist.get_world_size()
    kind, _, sharded = how.partition(" ")
    model: nn.Module = Network()
    if kind == "tensor":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], dict(TENSOR_PARALLEL))
        options["mesh"] = mesh["data"]
    elif kind == "hybrid":
        options["mesh"] = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "data"))
    if variant:
        bssn_fast.apply(model, variant, sharded=sharded, n_power_iterations=n)
    if blocks:
        for block in model.blocks:
            fully_shard(block, **options)
    fully_shard(model, **options)
    parts = world // 2 if kind == "tensor" else world
    return model, dist.get_rank() // (world // parts), parts


def fsdp(variant: str, how: str, blocks: bool, steps: int) -> Result:
    model, rank, world = sharded_network(variant, how, blocks)
    return train(model, steps, rank=rank, world=world)


class Messages(TorchDispatchMode):
    """Records what is sent: name and bytes of each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        name = func.name()
        if name.startswith(("c10d::", "_c10d_functional::")) and "wait" not in name:
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            self.sent.append((name.partition("::")[2], max((x.nbytes for x in tensors), default=0)))
        return func(*args, **(kwargs or {}))

    def take(self) -> list[tuple[str, int]]:
        found, self.sent = self.sent, []
        return found


def added(with_: list[tuple[str, int]], without: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return the messages that are there beside those of a model that is not normalised."""
    left = list(with_)
    for message in without:
        left.remove(message)
    return left


def messages(variant: str, how: str, blocks: bool, n: int) -> dict[str, list[tuple[str, int]]]:
    """What normalisation sends in a training step, forward and backward, and in evaluation, once it is under way."""
    found: dict[str, list[list[tuple[str, int]]]] = {}
    for normalized in (True, False):
        if how == "tensor parallel":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            model = parallelize_module(Network(), mesh, dict(TENSOR_PARALLEL))
            if normalized:
                bssn_fast.apply(model, variant, n_power_iterations=n)
        else:
            model, _, _ = sharded_network(variant if normalized else "", how, blocks, n=n)
        x = batches(1)[0]
        for _ in range(2):
            with Messages() as sent:
                loss = model(x).square().mean()
                forward = sent.take()
                loss.backward()
                backward = sent.take()
        model.eval()
        with torch.no_grad():
            for _ in range(2):
                with Messages() as sent:
                    model(x)
                    evaluation = sent.take()
        for name, value in (("forward", forward), ("backward", backward), ("evaluation", evaluation)):
            found.setdefault(name, []).append(value)
    return {name: added(*both) for name, both in found.items()}


def fails_on_one_rank(what: str) -> str:
    """What each rank hears when one of them fails inside the normalisation."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = bssn_fast.apply(parallelize_module(Network(), mesh, dict(TENSOR_PARALLEL)))
    x = batches(1)[0]
    model(x)
    norm = model.blocks[0].up.parametrizations.weight[0]
    before = norm._u.clone()
    if dist.get_rank() == 1:
        if what == "vectors":
            norm._buffers["_v"] = torch.ones(3)
        else:
            norm._v.untyped_storage().resize_(0)
    try:
        model(x)
    except (RuntimeError, ValueError) as error:
        assert torch.equal(norm._u, before)
        return f"{type(error).__name__}: {error}"
    return "nothing"


def ends_in_a_step(rank: int, folder: str) -> None:
    """Train until rank 1 fails in a forward; write down what each rank was told."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = bssn_fast.apply(parallelize_module(Network(), mesh, dict(TENSOR_PARALLEL)))
    try:
        for step, x in enumerate(batches(3)):
            if (rank, step) == (1, 2):
                raise ValueError("this rank has failed")
            model(x).sum().backward()
    except Exception as error:
        (Path(folder) / str(rank)).write_text(str(error))
        raise


def gain_of_a_function(sharded: DTensor) -> None:
    weight, vectors = torch.randn(4, 4), (torch.ones(4) / 2, torch.ones(4) / 2)
    one = distribute_tensor(torch.ones(1), sharded.device_mesh, [Replicate()])
    bssn_fast.normalize([weight], [vectors], gains=[one])


def refusals() -> dict[str, str]:
    """What is said where a sharded weight cannot be normalised."""
    said: dict[str, str] = {}

    def refuse(what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except (TypeError, ValueError, RuntimeError) as error:
            said[what] = str(error)

    mesh = init_device_mesh("cpu", (2,))

    def layer(placement: Placement, dtype: torch.dtype = torch.float32) -> nn.Module:
        found = nn.Linear(4, 4).to(dtype)
        found.weight = nn.Parameter(DTensor.from_local(found.weight.detach(), mesh, [placement]))
        found.bias = nn.Parameter(DTensor.from_local(found.bias.detach(), mesh, [placement]))
        return nn.Sequential(found)

    refuse("partial", lambda: bssn_fast.apply(layer(Partial())))
    refuse("complex", lambda: bssn_fast.apply(layer(Shard(0), torch.complex64)))
    refuse("vector", lambda: bssn_fast.apply(layer(Shard(0)), names=["0.bias"]))
    weight = layer(Shard(0))[0].weight
    refuse("functional", lambda: bssn_fast.normalize([weight], [(torch.ones(8), torch.ones(4))]))
    model = bssn_fast.apply(layer(Replicate()))
    x = distribute_tensor(torch.ones(1, 4), mesh, [Replicate()])
    refuse("compiled", lambda: torch.compile(lambda: model(x), backend="eager", fullgraph=True)())
    refuse("gain", lambda: bssn_fast.apply(layer(Shard(0)), "sn", gain="learn"))
    refuse("blocks", lambda: bssn_fast.apply(layer(Shard(0)), "sn", blocks={"0": 2}))
    model = bssn_fast.apply(nn.Sequential(nn.Linear(4, 4)), "sn", blocks={"0": 2})
    model[0].parametrizations.weight.original = weight
    refuse("blocks of what was sharded later", lambda: model(torch.ones(1, 4)))
    refuse("gain of a function", lambda: gain_of_a_function(weight))
    refuse("measured", lambda: bssn_fast.spectral_norms(layer(Shard(0))))
    refuse("projected", lambda: bssn_fast.Projection(layer(Shard(0)), radius=1.0))
    refuse("setting", lambda: bssn_fast.apply(layer(Replicate()), sharded="never"))
    model, _, _ = sharded_network("sn", "fsdp reduce", True)
    refuse("not gathered", lambda: model.blocks[0].up.weight)
    return said
