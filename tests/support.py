"""Models, and a second, slower way to the same results that shares no code with the package but its reference."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import bssn_fast
from bssn_fast import reference
from bssn_fast.laws import AT_MOST
from bssn_fast.modules.parametrization import SpectralNormalization

VARIANTS = ("sn", "ssn", "bsn", "bssn")

LAYERS = {
    # name: (layer, shape of an input; None for an embedding's indices)
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3), (2, 3, 6, 6)),
    "conv2d_1x1": (lambda: nn.Conv2d(5, 7, 1), (2, 5, 4, 4)),
    "conv2d_groups": (lambda: nn.Conv2d(4, 8, (3, 2), groups=2), (2, 4, 5, 5)),
    "conv2d_depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 5, (1, 2, 3)), (1, 2, 3, 4, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=2), (2, 4, 8)),
    "transposed2d": (lambda: nn.ConvTranspose2d(5, 3, 4, stride=2), (2, 5, 4, 4)),
    "transposed2d_groups": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), (2, 6, 4, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(3, 2, (2, 1, 2)), (1, 3, 2, 3, 2)),
    "linear": (lambda: nn.Linear(9, 5), (4, 9)),
    "linear_head": (lambda: nn.Linear(9, 1, bias=False), (4, 9)),
    "conv2d_head": (lambda: nn.Conv2d(6, 1, 4), (2, 6, 4, 4)),
    "embedding": (lambda: nn.Embedding(7, 5), None),
}


def layer_and_input(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[name]
    if shape is None:
        return make().to(dtype), torch.tensor([[0, 3, 6], [1, 1, 5]])
    return make().to(dtype), torch.randn(shape, dtype=dtype)


class Net(nn.Module):
    """A discriminator of 6x6 images with every kind of geometry: both directions, one, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(
            nn.LeakyReLU(0.2), nn.Conv2d(8, 5, 4, stride=2, padding=1), nn.Tanh(), nn.ConvTranspose2d(5, 4, 2)
        )
        self.head = nn.Linear(64, 1)
        self.embed = nn.Embedding(3, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.first(x)).tanh().flatten(1)
        labels = torch.arange(len(x), device=x.device) % 3
        return self.head(x) + (self.embed(labels) * x).sum(1, keepdim=True)


LAYER_NAMES = ("first", "body.1", "body.3", "head", "embed")


def images(n: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, 6, 6, dtype=dtype)


def norm_of(module: nn.Module) -> SpectralNormalization:
    """The package's parametrization of a layer's weight."""
    (found,) = module.parametrizations["weight"]
    return found


def original(module: nn.Module) -> nn.Parameter:
    """A layer's weight before normalisation."""
    return module.parametrizations["weight"].original


def norms(model: nn.Module) -> dict[str, SpectralNormalization]:
    return {n: norm_of(m) for n, m in model.named_modules() if parametrize.is_parametrized(m, "weight")}


def in_use(model: nn.Module) -> list[str]:
    """Names of the layers for which a call of a model has results that have not been dropped."""
    return [n for n, p in norms(model).items() if any(g.calls or g.published is not None for g in p.groups)]


def vectors_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all u and v."""
    return {f"{n}.{k}": b.clone() for n, p in norms(model).items() for k, b in p.named_buffers()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Plain(nn.Module):
    """The reference as a parametrization of torch's: iterates at each access in training mode, one graph for each."""

    def __init__(self, norm: SpectralNormalization) -> None:
        super().__init__()
        self.dim, self.settings = norm.dim, norm.settings
        self.vectors = tuple(b.clone() for b in norm.buffers())
        self.train(norm.training)

    def _apply(self, fn, recurse=True):
        self.vectors = tuple(map(fn, self.vectors))
        return self

    def forward(self, weight: Tensor) -> Tensor:
        s = self.settings
        n, (blocks, indexed) = s.n_power_iterations if self.training else 0, s.stack
        if blocks == 1 and not indexed:
            result, self.vectors, self.sigma = reference.normalize(
                weight,
                self.vectors,
                self.dim,
                scale=s.scale,
                at_most=s.kind == AT_MOST,
                eps=s.eps,
                n_power_iterations=n,
            )
            return result
        rows = weight.shape[0] // blocks
        found = [
            reference.normalize(
                weight[j] if indexed else weight[j * rows : (j + 1) * rows],
                tuple(v[j] for v in self.vectors),
                0,
                scale=law.number,
                at_most=law.kind == AT_MOST,
                eps=s.eps,
                n_power_iterations=n,
            )
            for j, law in enumerate(s.laws())
        ]
        parts, vectors, sigma = zip(*found, strict=True)
        self.vectors = tuple(torch.stack(each) for each in zip(*vectors, strict=True))
        self.sigma = torch.stack(sigma)
        return torch.cat(parts).view_as(weight)


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a normalised model that computes with `Plain` what it computes with the package."""
    twin = copy.deepcopy(model)
    found = norms(model)
    weights = {n: original(model.get_submodule(n)).detach().clone() for n in found}
    bssn_fast.remove(twin)
    for name, norm in found.items():
        layer = twin.get_submodule(name)
        with torch.no_grad():
            layer.weight.copy_(weights[name])
        parametrize.register_parametrization(layer, "weight", Plain(norm), unsafe=True)
    return twin


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {n: p.grad for n, p in model.named_parameters()}


def assert_same_gradients(model: nn.Module, twin: nn.Module, rtol: float, least: float = 1e-30) -> None:
    """Compare gradients relative to the largest entry of each, if that is not below `least`, where all is rounding."""
    ours, theirs = gradients(model), gradients(twin)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        if expected is None:
            assert ours[name] is None, name
            continue
        assert ours[name] is not None, name
        error = (ours[name] - expected).abs().max() / expected.abs().max().clamp_min(least)
        assert error <= rtol, f"{name}: {error:.2e}"
