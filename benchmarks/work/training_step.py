"""Whole training steps of a GAN, so that normalisation is a percentage of something real."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.utils.parametrizations import spectral_norm

import bssn_fast
from benchmarks.against.in_torch import BidirectionalNorm, parametrized
from benchmarks.work.captured import capture
from benchmarks.work.devices import is_gpu
from benchmarks.work.networks import DISCRIMINATORS, NOISE, Generator, weight_layers
from benchmarks.work.problem import EPS, VARIANTS, WrongResultError

NONE = "none"
CASES = ((NONE, NONE), *((variant, peer) for variant in VARIANTS for peer in ("torch", "bssn_fast")))
"""(variant, peer) of all discriminators that are compared."""

SCORES = "scores"
GRAPH = "graph"
"""Ends the names of peers whose whole step is captured in a CUDA graph and replayed."""


def captured_name(peer: str) -> str:
    """Return the name of a peer's captured step."""
    return GRAPH if peer == NONE else f"{peer} {GRAPH}"


def without_normalisation(peer: str) -> str:
    """Return the name of the step without normalisation that this one is compared with: captured as well, or not."""
    return GRAPH if peer.endswith(GRAPH) else NONE


TOLERANCE = 1e-5
"""Largest relative difference between the scores, and the weights' gradients, of ours and torch's discriminators."""
SCORES_ON_GPU, GRADIENTS_ON_GPU = 1e-4, 2e-2
"""The same on a GPU, where the layers' own sums are in another order each time. An activation next to zero may then be
on its other side, where its slope is another: weights that differ by 2e-7 gave up to 2e-3 in 1 of 12 trials."""


def batch_size(device: torch.device | str) -> int:
    """Return how many images a step takes: as the papers do on a GPU, fewer on a CPU."""
    return 64 if torch.device(device).type == "cuda" else 8


class Step:
    """One step of the discriminator and one of the generator: hinge loss, Adam.

    capturable: whether Adam keeps its count of steps on the GPU, as a CUDA graph needs it.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        batch: int,
        device: torch.device | str,
        width: int = 64,
        *,
        capturable: bool = False,
    ) -> None:
        torch.manual_seed(1)
        capturable &= torch.device(device).type == "cuda"
        self._d = discriminator
        self._g = Generator(width).to(device)
        self._real = torch.rand(batch, 3, 32, 32, device=device) * 2 - 1
        self._noise = torch.randn(2, batch, NOISE, device=device)
        self._optimize_d = torch.optim.Adam(discriminator.parameters(), 2e-4, (0.0, 0.9), capturable=capturable)
        self._optimize_g = torch.optim.Adam(self._g.parameters(), 2e-4, (0.0, 0.9), capturable=capturable)

    def __call__(self) -> None:
        with torch.no_grad():
            fake = self._g(self._noise[0])
        loss = relu(1 - self._d(self._real)).mean() + relu(1 + self._d(fake)).mean()
        self._optimize_d.zero_grad()
        loss.backward()
        self._optimize_d.step()
        loss = -self._d(self._g(self._noise[1])).mean()
        self._optimize_g.zero_grad()
        loss.backward()
        self._optimize_g.step()


class Replay:
    """A step, replayed once `capture` has made a CUDA graph of it. The graph writes where the step's tensors are."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def capture(self) -> None:
        """Run the step a few times and capture it."""
        (self._graph,) = capture([self._step])

    def __call__(self) -> None:
        self._graph.replay()


def discriminators(
    kind: str, device: torch.device | str = "cpu", width: int | None = None
) -> dict[tuple[str, str], nn.Module]:
    """Return equal discriminators by (variant, peer): without normalisation, by torch and by bssn_fast.

    Raises WrongResultError if they do not give the same scores and gradients.
    """
    torch.manual_seed(0)
    plain = (DISCRIMINATORS[kind](width) if width else DISCRIMINATORS[kind]()).to(device)
    images = torch.rand(4, 3, 32, 32, device=device) * 2 - 1
    found: dict[tuple[str, str], nn.Module] = {(NONE, NONE): plain}
    for variant, (_, scale) in VARIANTS.items():
        ours = copy.deepcopy(plain)
        bssn_fast.apply(ours, variant, scale=None if variant == "sn" else scale, eps=EPS)
        rival = copy.deepcopy(plain)
        if variant == "sn":
            for layer in weight_layers(rival):
                spectral_norm(layer, eps=EPS)
            rival.load_state_dict(ours.state_dict())
        else:
            for layer, mine in zip(weight_layers(rival), weight_layers(ours), strict=True):
                norm = mine.parametrizations.weight[0]
                vectors = tuple(norm.get_buffer(name) for name in norm.vector_names)
                parametrized(layer, BidirectionalNorm(vectors, norm.dim, scale))
        right = _outcome(rival, images)
        for what, tensor in _outcome(ours, images).items():
            _check_equal(f"{kind}, {variant}: {what}", tensor, right[what])
        found[variant, "torch"], found[variant, "bssn_fast"] = rival, ours
    return found


def _outcome(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the scores, and the gradient of each parameter by their sum, from layers in full precision."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        scores = model(images)
        gradients = torch.autograd.grad(scores.sum(), parameters)
    return {SCORES: scores.detach(), **dict(zip(names, gradients, strict=True))}


def _check_equal(what: str, a: Tensor, b: Tensor) -> None:
    error = torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)
    on_gpu = SCORES_ON_GPU if what.endswith(SCORES) else GRADIENTS_ON_GPU
    if not error <= (on_gpu if is_gpu(a.device) else TOLERANCE):
        raise WrongResultError(f"{what} differ by {error:.1e}")
