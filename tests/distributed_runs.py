"""What the ranks of the distributed tests run, and one process alone to compare with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from support import vectors_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import bssn_fast

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
    return bssn_fast.apply(Critic().double(), **settings)


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
    mean = torch.stack(losses)
    if split:
        dist.all_reduce(mean)
        mean /= world
    weights = {name: full(p.detach()) for name, p in model.named_parameters()}
    return {"losses": mean, **vectors_of(model), **weights}


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def alone(steps: int, share: bool = False, recompute: bool = False) -> Result:
    torch.manual_seed(0)
    model = critic()
    model.recompute = recompute
    return train(model, model, steps, share=share)


def ddp(steps: int, outer: bool, split: bool, gradient_groups: int) -> Result:
    torch.manual_seed(dist.get_rank())  # DDP begins with rank 0's parameters and buffers
    model = critic(gradient_groups=gradient_groups)
    wrapped = DistributedDataParallel(Outer(model) if outer else model)
    return train(wrapped, model, steps, split=split)


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
