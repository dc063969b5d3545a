"""What the ranks of the distributed tests run, and one process alone to compare with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from block_models import Experts
from support import vectors_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import bssn_fast
import bssn_fast.diagnostics

BATCH = 4
Result = dict[str, Tensor]


class Critic(nn.Module):
    """Two blocks, of which the first one is used twice, and layers outside the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.Tanh(), nn.ConvTranspose2d(4, 6, 3, padding=1))
            for _ in range(2)
        )
        self.head = nn.Linear(6 * 16, 1)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in (self.blocks[0], self.blocks[1], self.blocks[0]):
            x = x + (checkpoint(block, x, use_reentrant=False) if self.recompute else block(x))
        return self.head(x.flatten(1))


class Outer(nn.Module):
    """A module that contains the normalised one."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.discriminator = discriminator

    def forward(self, x: Tensor) -> Tensor:
        return self.discriminator(self.scale * x)


def critic(**settings: object) -> Critic:
    """Normalised; two of its weights hold several matrices."""
    return bssn_fast.apply(Critic().double(), **{"blocks": {"first": 3, "blocks.1.0": 2}, **settings})


def batches(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(steps, 2, BATCH, 3, 4, 4, generator=generator, dtype=torch.float64))


def hinge(call: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
    """Two forwards, the mean over the images of each."""
    return torch.relu(1 - call(real)).mean() + torch.relu(1 + call(fake)).mean()


def train(call: nn.Module, model: nn.Module, steps: int, *, split: bool = False, share: bool = False) -> Result:
    """Train; split: each rank takes its part of every batch. share: both forwards share one normalisation."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if split else (0, 1)
    optimizer = torch.optim.Adam(call.parameters(), lr=1e-2)
    losses = []
    for real, fake in batches(steps):
        with bssn_fast.cached(model) if share else contextlib.nullcontext():
            loss = hinge(call, real[rank::world], fake[rank::world])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    mean = torch.stack(losses) if losses else torch.zeros(0)
    if split:
        dist.all_reduce(mean)
        mean /= world
    weights = {name: full(p.detach()) for name, p in model.named_parameters()}
    return {"losses": mean, **vectors_of(model), **weights}


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def alone(steps: int, share: bool = False, recompute: bool = False, **settings: Any) -> Result:
    torch.manual_seed(0)
    model = critic(**settings)
    model.recompute = recompute
    return train(model, model, steps, share=share)


class Sampled(nn.Module):
    """Takes several samples in one forward, each through checkpoints around parts, as a nowcasting model does."""

    def __init__(self, model: Critic, samples: int, repeat: bool, use_reentrant: bool) -> None:
        super().__init__()
        self.model, self.samples, self.repeat, self.use_reentrant = model, samples, repeat, use_reentrant

    def part(self, module: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(module, x, use_reentrant=self.use_reentrant) if self.repeat else module(x)

    def forward(self, x: Tensor) -> Tensor:
        model, found = self.model, []
        for k in range(self.samples):
            h = self.part(model.first, x * (1 + 0.1 * k))
            for block in model.blocks:
                h = h + self.part(block, h)
            found.append(self.part(model.head, h.flatten(1)))
        return torch.stack(found).mean(0)


def ddp_samples(how: str, use_reentrant: bool) -> tuple[Result, Result]:
    """Training with checkpoints under DDP, and what torch's own norm gives without checkpoints and DDP.

    how: layers iterate at each access, as torch's do; so they do by themselves; or once in a call of the whole.
    """
    torch.manual_seed(0)
    model = critic(variant="sn", update="access", blocks=None)
    plain = Sampled(with_torchs_norm(model), 3, False, use_reentrant)
    sampled = Sampled(model, 3, True, use_reentrant)
    if how != "access":
        bssn_fast.apply(sampled if how == "whole" else model, "sn")
    found = train_with_inputs(DistributedDataParallel(sampled, static_graph=True), model, 5, split=True)
    once = parametrize.cached if how == "whole" else contextlib.nullcontext
    return found, train_with_inputs(plain, plain.model, 5, block=once)


def with_torchs_norm(model: Critic) -> Critic:
    plain = Critic().double()
    weights = {n: p.detach() for n, p in model.named_parameters()}
    for name, layer in plain.named_modules():
        if f"{name}.parametrizations.weight.original" in weights:
            with torch.no_grad():
                layer.weight.copy_(weights[f"{name}.parametrizations.weight.original"])
                layer.bias.copy_(weights[f"{name}.bias"])
            nn.utils.parametrizations.spectral_norm(layer)
    plain.load_state_dict(model.state_dict())
    return plain


def train_with_inputs(
    call: nn.Module,
    model: nn.Module,
    steps: int,
    *,
    split: bool = False,
    block: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Result:
    """Steps of SGD, one forward and one backward each; inputs want gradients, as reentrant checkpoints need it."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if split else (0, 1)
    optimizer = torch.optim.SGD(call.parameters(), lr=1e-2)
    for real, _ in batches(steps):
        optimizer.zero_grad()
        with block():
            call(real[rank::world].clone().requires_grad_()).square().mean().backward()
        optimizer.step()
    return {name: v.detach().clone() for name, v in model.state_dict().items()}


LAWS: dict[str, Any] = {"variant": "bsn", "gain": ["first", "head"], "at_most": {"blocks.0.0": 0.5}}


def ddp(steps: int, outer: bool, split: bool, **settings: Any) -> Result:
    torch.manual_seed(dist.get_rank())  # DDP begins with rank 0's parameters and buffers
    model = critic(**settings)
    wrapped = DistributedDataParallel(Outer(model) if outer else model)
    return train(wrapped, model, steps, split=split)


def accumulate(call: nn.Module, model: nn.Module, steps: int, *, split: bool) -> Result:
    """Train with the gradients of three batches, of which only the last one is sent."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if split else (0, 1)
    optimizer = torch.optim.SGD(call.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        for k, (real, fake) in enumerate(batches(3)):
            with call.no_sync() if split and k < 2 else contextlib.nullcontext():
                hinge(call, real[rank::world] + step, fake[rank::world]).backward()
        optimizer.step()
    return {**vectors_of(model), **{name: p.detach().clone() for name, p in model.named_parameters()}}


def ddp_accumulation(steps: int, gradient_groups: int) -> Result:
    torch.manual_seed(0)
    model = critic(gradient_groups=gradient_groups)
    return accumulate(DistributedDataParallel(model), model, steps, split=True)


def accumulation_alone(steps: int) -> Result:
    torch.manual_seed(0)
    model = critic()
    return accumulate(model, model, steps, split=False)


def ddp_progress(gradient_groups: int) -> list[str]:
    """How far the backward pass had come when each bucket of gradients was sent."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(4)))
    wrapped = DistributedDataParallel(bssn_fast.apply(model, gradient_groups=gradient_groups), bucket_cap_mb=1e-6)
    reached, sent = [""], []
    for name, layer in model.named_children():
        layer.register_full_backward_pre_hook(lambda *_, name=name: reached.append(name))

    def send(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        sent.append(reached[-1])
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda f: f.value()[0] / dist.get_world_size())

    send.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}  # DDP looks at them
    wrapped.register_comm_hook(None, send)
    for _ in range(2):  # DDP finds its buckets in the first
        sent.clear()
        wrapped(torch.randn(2, 6, requires_grad=True)).sum().backward()
    return sent


def ddp_broadcast() -> list[Tensor]:
    """Outputs in evaluation and training after a rank's vectors were changed, also where results were kept."""
    torch.manual_seed(0)
    model = critic()
    wrapped = DistributedDataParallel(model)
    x = batches(1)[0][0]
    outputs = []
    for training in (False, True):
        wrapped.train(training)
        wrapped(x), wrapped(x)
        if dist.get_rank() == 0:
            for vector in model.first.parametrizations.weight[0].buffers():
                vector.copy_(torch.nn.functional.normalize(torch.randn_like(vector), dim=0))
        outputs.append(wrapped(x).detach())
    return outputs


def reduced_in_a_block() -> list[tuple[Tensor, Tensor]]:
    """Outputs of calls in one block, after a sum over all ranks straight into the weights, and what they must be."""
    torch.manual_seed(0)
    model, plain = critic(), critic()
    plain.load_state_dict(model.state_dict())
    x = batches(1)[0][0]
    found = []
    with bssn_fast.cached(model), torch.no_grad():
        for collective in ("none", "reduce", "broadcast", "gather", "coalesced"):
            for parameter in original_weights(model):
                weight = parameter.detach()  # shares its memory; torch counts no version for it
                before = [parameter._version, weight.clone()]
                if collective == "reduce":
                    dist.all_reduce(weight)
                elif collective == "broadcast":
                    weight.data.mul_(1 + dist.get_rank()), dist.broadcast(weight, 1)
                elif collective == "gather":
                    pieces = [weight.clone(), weight]
                    dist.all_gather(pieces, weight * (2 + dist.get_rank()))
                elif collective == "coalesced":
                    work = dist.all_reduce(weight.view(-1)[::1], async_op=True)
                    work.wait()
                assert collective == "none" or not torch.equal(before[1], weight)
            output = model(x)
            plain.load_state_dict(model.state_dict())
            found.append((output, plain.eval()(x)))
    return found


def shard(model: Critic, how: str) -> nn.Module:
    if how not in ("root", "resharded root"):
        for block in model.blocks:
            fully_shard(block, reshard_after_forward=True)
    if how == "layers":
        for layer in (model.first, model.head):
            fully_shard(layer)
    if how == "together":
        fully_shard([model.first, model.head])
    return fully_shard(model, reshard_after_forward=how == "resharded root")


def fsdp(steps: int, how: str, share: bool = False, recompute: bool = False) -> Result:
    torch.manual_seed(0)
    model = critic()
    with torch.no_grad():  # plans are there, and results are kept, from before
        model.eval()(batches(1)[0][0])
    model.train()
    model.recompute = recompute
    return train(shard(model, how), model, steps, split=True, share=share)


def fsdp_evaluation(how: str) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs before and after small changes of one element of each weight; those of a model that is not sharded."""
    torch.manual_seed(0)
    plain = critic().eval()
    torch.manual_seed(0)
    model = critic().eval()
    shard(model, how)
    x = batches(1)[0][0]
    found, expected = [], []
    with torch.no_grad():
        for _ in range(3):
            found.append(model(x))
            expected.append(plain(x))
            for p in original_weights(plain):
                p.view(-1)[1] += 0.1
            model.reshard()
            for p in original_weights(model):
                if dist.get_rank() == 0:  # it holds the first rows
                    p.to_local().view(-1)[1] += 0.1
    return found, expected


def fsdp_diagnostics(sharded: bool, gain: bool) -> Result:
    """What is measured of a layer with two blocks, one with none, and three experts; with gains, sharded as a whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4), Experts()).double()
    bssn_fast.apply(model, "bsn", blocks={"0": 2, "2.weight": 3}, gain="learn" if gain else None)
    [fully_shard(module) for module in ((*(() if gain else model), model) if sharded else ())]
    model(torch.ones(2, 5, dtype=torch.float64)).square().mean().backward()
    measured = bssn_fast.diagnostics.measure(model)
    return {f"{name}.{key}": torch.tensor(v) for name, m in measured.items() for key, v in m._asdict().items()}


def original_weights(model: nn.Module) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if name.endswith("original")]


def refusals() -> dict[str, str]:
    """What is said where a sharded weight cannot be normalised."""
    said: dict[str, str] = {}

    def refuse(what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except (TypeError, ValueError) as error:
            said[what] = str(error)

    model = fully_shard(Critic())
    refuse("apply after fully_shard", lambda: bssn_fast.apply(model))
    model = critic()
    fully_shard(model.blocks[1])
    fully_shard(model)
    refuse("read before the first call", lambda: model.first.weight)
    model(batches(1)[0][0])
    refuse("read after a call", lambda: model.blocks[1][0].weight)
    model.unshard()
    said["read after unshard"] = str(tuple(model.first.weight.shape))
    refuse("apply while unsharded", lambda: bssn_fast.apply(model, "sn"))
    refuse("remove while unsharded", lambda: bssn_fast.remove(model))
    model = critic(variant="sn", gain=["blocks.1.0"])
    fully_shard(model.blocks[1])
    fully_shard(model)
    refuse("gain in a sharded block", lambda: model(batches(1)[0][0]))
    refuse("apply after DDP", lambda: bssn_fast.apply(DistributedDataParallel(Critic())))
    for nested in (False, True):
        model = critic()
        if nested:
            model.blocks[1] = flat(model.blocks[1])
        wrapped = flat(model, use_orig_params=nested)
        refuse(f"FullyShardedDataParallel {nested}", lambda call=wrapped: call(batches(1)[0][0]))
    return said


def flat(module: nn.Module, use_orig_params: bool = True) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(module, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


def ddp_compiled(steps: int, inside: bool, gradient_groups: int) -> Result:
    """DDP around a compiled model, or a compiled DDP."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = critic(gradient_groups=gradient_groups)
    compiler = CompileCounterWithBackend("aot_eager")
    if inside:
        call = DistributedDataParallel(torch.compile(model, backend=compiler, fullgraph=True))
    else:
        call = torch.compile(DistributedDataParallel(model), backend=compiler)
    result = train(call, model, steps, split=True)
    assert compiler.frame_count > 0
    return result


def fsdp_compiled(steps: int, how: str) -> Result:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = critic()
    compiler = CompileCounterWithBackend("aot_eager")
    result = train(torch.compile(shard(model, how), backend=compiler), model, steps, split=True)
    assert compiler.frame_count > 0
    return result
