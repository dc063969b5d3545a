"""What else is done with sharded models: mixed precision, moving averages, checkpoints, recomputation, compilation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_runs import full
from sharded_runs import TENSOR_PARALLEL, Network, Result, batches, sharded_network
from support import vectors_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

import bssn_fast
import bssn_fast.diagnostics

HOWS = ("fsdp gather root", "fsdp gather blocks", "fsdp reduce blocks", "tensor parallel")
STEPS = 6


def build(how: str, **options: object) -> nn.Module:
    """Return the network in one of the HOWS; all ranks take the same data. An empty `how` is one process."""
    torch.manual_seed(0)
    if not how:
        return bssn_fast.apply(Network())
    if how == "tensor parallel":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return bssn_fast.apply(parallelize_module(Network(), mesh, dict(TENSOR_PARALLEL)))
    kind, _, where = how.rpartition(" ")
    return sharded_network("bssn", kind, where == "blocks", **options)[0]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def loss_of(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return (call(x).float() - x.sin().mean(1, keepdim=True)).square().mean()


def steps(
    model: nn.Module,
    data: list[Tensor],
    optimizer: torch.optim.Optimizer,
    call: Callable[[Tensor], Tensor] | None = None,
    after: Callable[[], None] = lambda: None,
    twice: bool = False,
) -> Result:
    """Train; after: called at the end of each step. twice: two forwards before each backward, in a block."""
    call = model if call is None else call  # a compiled module has no truth value
    losses = []
    for x in data:
        with bssn_fast.cached(model) if twice else contextlib.nullcontext():
            loss = loss_of(call, x)
            if twice:
                loss = (loss + loss_of(call, -x)) / 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), **state(model)}


def state(model: nn.Module) -> Result:
    return {**vectors_of(model), **{name: full(p.detach()).float() for name, p in model.named_parameters()}}


def plain(how: str) -> Result:
    model = build(how)
    return steps(model, batches(STEPS), optimizer_of(model))


def bf16(how: str) -> Result:
    """Weights are gathered in bfloat16; weights and gradients that are sharded are in float32."""
    if how:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model = build(how, mp_policy=policy)
        found = steps(model, batches(STEPS), optimizer_of(model))
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert all(b.dtype == torch.float32 for b in model.buffers())
        return found
    master, model = build(""), build("")
    model = model.bfloat16()
    optimizer = optimizer_of(master)
    losses = []
    for x in batches(STEPS):
        with torch.no_grad():
            for p, own in zip(model.parameters(), master.parameters(), strict=True):
                p.copy_(own)
                p.grad = None
        loss = loss_of(lambda x: model(x.bfloat16()), x)
        loss.backward()
        for p, own in zip(model.parameters(), master.parameters(), strict=True):
            own.grad = p.grad.float()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), **state(master), **vectors_of(model)}


def ema(how: str) -> Result:
    """A moving average of weights and vectors in a model that is sharded alike, evaluated after training."""
    model, average = build(how), build(how).eval()

    @torch.no_grad()
    def follow() -> None:
        for mean, now in zip(
            [*average.parameters(), *average.buffers()], [*model.parameters(), *model.buffers()], strict=True
        ):
            mean.lerp_(now, 0.3)

    found = steps(model, batches(STEPS), optimizer_of(model), after=follow)
    with torch.no_grad():
        outputs = [average(x) for x in batches(2)]
    return {**found, "outputs": torch.stack(outputs), **{f"mean {k}": v for k, v in state(average).items()}}


def resume(how: str, folder: str) -> tuple[Result, Result]:
    """What a training gives that goes on, and one that begins from its distributed checkpoint."""
    data = batches(STEPS)
    model = build(how)
    optimizer = optimizer_of(model)
    steps(model, data[:3], optimizer)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    straight = steps(model, data[3:], optimizer)
    torch.manual_seed(7)
    again = build(how)
    with torch.no_grad():
        for tensor in (*again.parameters(), *again.buffers()):
            tensor.mul_(1.5)
    optimizer = optimizer_of(again)
    weights, moments = get_state_dict(again, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(again, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return straight, steps(again, data[3:], optimizer)


def cached(how: str) -> Result:
    model = build(how)
    return steps(model, batches(STEPS), optimizer_of(model), twice=True)


def inference_mode(how: str) -> Result:
    model = build(how)
    data, optimizer = batches(STEPS), optimizer_of(model)
    steps(model, data[:3], optimizer)
    with torch.inference_mode():
        training, evaluated = model(data[0]), model.eval()(data[0])
    return {
        "training": full(training).clone(),
        "evaluated": full(evaluated).clone(),
        **steps(model.train(), data[3:], optimizer),
    }


def recompute(how: str) -> Result:
    model = build(how)
    for block in model.blocks:
        block.forward = Recomputing(block.forward)
    return steps(model, batches(STEPS), optimizer_of(model))


class Recomputing:
    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self.forward = forward

    def __call__(self, x: Tensor) -> Tensor:
        return checkpoint(self.forward, x, use_reentrant=False)


def compiled(how: str) -> Result:
    torch._dynamo.reset()
    model = build(how)
    return steps(model, batches(STEPS), optimizer_of(model), call=torch.compile(model, backend="aot_eager"))


def double_backward(sharded: bool) -> Result:
    """Gradients of gradients through DTensors alone: outputs of parallelized modules lose them in torch 2.13 itself."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 7, bias=False)
    probe = torch.linspace(-3, 3, 35).sin().view(7, 5)
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
        probe = distribute_tensor(probe, mesh, [Shard(0)])
    weight = bssn_fast.apply(layer).weight
    original = layer.parametrizations.weight.original
    loss = full(weight.square().mul(probe).sum()) + full(weight.sin().mul(probe).sum())
    (first,) = torch.autograd.grad(loss, original, create_graph=True)
    (second,) = torch.autograd.grad(full(first.square().sum()), original, create_graph=True)
    (third,) = torch.autograd.grad(full(second.square().sum()), original)
    return {"first": full(first.detach()), "second": full(second.detach()), "third": full(third)}


def fully_sharded_after_a_call(how: str) -> Result:
    """Weights of a normalised model become DTensors; it is called once, and then given to fully_shard.

    FSDP's own pieces must then be told from those of tensor parallelism.
    """
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tensor"))
    model = bssn_fast.apply(nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 2, bias=False)), sharded=how)
    for layer, dim in zip(model, (0, 1), strict=True):
        placed = distribute_tensor(layer.parametrizations.weight.original.detach(), mesh["tensor"], [Shard(dim)])
        layer.parametrizations.weight.original = nn.Parameter(placed)
    x = distribute_tensor(torch.ones(3, 4), mesh["tensor"], [Replicate()])
    model(x)
    for module in (*model, model):
        fully_shard(module, mesh=mesh["data"])
    loss = model(x).square().mean()
    loss.backward()
    return {"loss": full(loss.detach()), **vectors_of(model)}


def corners(how: str) -> Result:
    """What else a normalised model is asked for, in one go."""
    found: Result = {}
    x = batches(1)[0]
    model = build(how)
    layer = model.blocks[0].up
    found["read in training"] = full(layer.weight.detach())
    found["summary"] = torch.tensor([float(line.split()[-1]) for line in bssn_fast.summary(model).splitlines()[1:]])
    originals(model)[0].requires_grad_(False)
    model(x).sum().backward()
    found["of a frozen weight"] = torch.tensor(float(originals(model)[0].grad is None))
    for name, measured in bssn_fast.diagnostics.measure(model).items():
        found[f"measured {name}"] = torch.tensor([value for value in measured if value is not None])
    copied = copy.deepcopy(model)
    found["copied"] = copied(x).detach()
    found["its original"] = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = model(x).detach().float()
    found["vectors after autocast"] = torch.cat(list(vectors_of(model).values()))
    model.eval()
    found["read in evaluation"] = full(layer.weight.detach())
    with torch.no_grad():
        original = layer.parametrizations.weight.original
        kept = original.detach().clone()
        original.zero_()
        found["zeros"] = torch.cat([full(layer.weight).flatten(), bssn_fast.sigma(model)["blocks.0.up"][None]])
        original.fill_(float("nan"))
        found["NaN"] = full(layer.weight).isnan().float()
        model.train()
        model(x)  # does not spoil the vectors
        original.copy_(kept)
        model.eval()
        found["after NaN"] = model(x)
    layer.weight = kept * -2 + 1
    found["assigned"] = full(layer.weight.detach())
    plain_state = {n.replace("parametrizations.weight.original", "weight"): p for n, p in model.named_parameters()}
    loaded = build(how)
    loaded.load_state_dict(plain_state)
    found["loaded"] = loaded.eval()(x).detach()
    bssn_fast.remove(model)
    found["removed"] = model(x).detach()
    found |= {f"plain {name}": full(p.detach()) for name, p in model.named_parameters()}
    bssn_fast.apply(model, "sn", update="access", n_power_iterations=2)
    found["access"] = full(model.train().head.weight.detach())
    return found


def originals(model: nn.Module) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if name.endswith("original")]
