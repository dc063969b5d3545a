"""One training with everything that the claims need measured."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from gan import data
from gan.metrics import Judge
from gan.networks import weight_layers
from gan.training import Run
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bssn_fast.diagnostics import initial_variances, measure
from experiments.measures import depth, inception
from experiments.measures.scores import GENERATED, Scorer
from experiments.plan import Trial

SLOPE_IMAGES = 32
SHOWN = 10
"""Images of each trial with seed 0 that its record keeps."""
GROWN = 1e6
"""A training with a loss beyond this has diverged, though its numbers may still be finite."""


class Observed(Protocol):
    """What is asked of a run that is recorded."""

    discriminator: nn.Module
    images: data.Images
    steps_done: int

    def advance(self, steps: int) -> tuple[Tensor, Tensor]: ...

    def lengths(self) -> dict[str, float]: ...

    def sample(self, labels: Tensor, seed: int = 0) -> Tensor: ...


class WatchedRun(Run):
    """A run whose discriminator's gradients with respect to the *normalised* weights are watched at every step.

    The paper's bound (section 3): if all layers have norm 1, the activations slope at most 1 and so does the loss, then
    each layer's gradient is at most as long as the network's input. The loss here is the mean over a real batch plus
    the mean over a generated one, so that the sum of the mean lengths of their images is the bound.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gradients: dict[str, Tensor] = {}
        self.handles: dict[str, list[RemovableHandle]] = {}
        self.images_norm = 0.0
        self.ratio = 0.0
        self.bound_broken = 0
        for name, layer in weight_layers(self.discriminator).items():
            layer.register_forward_hook(self._watch(name))
        self.discriminator.register_forward_pre_hook(self._see_images)

    def _watch(self, name: str) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:
            self.gradients[name] = self.gradients[name] + gradient if name in self.gradients else gradient

        def hook(layer: nn.Module, *_: Any) -> None:
            weight = layer.weight  # inside a call of the model: the very tensor that the layer has used
            # One hook a step on a weight that is not normalised: it sees the sum of both calls' gradients.
            watched = weight.is_leaf and name in self.handles
            if torch.is_grad_enabled() and weight.requires_grad and not watched:
                self.handles.setdefault(name, []).append(weight.register_hook(add))

        return hook

    def _see_images(self, _: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        if not inputs[0].requires_grad:  # a generator's step is not watched
            self.images_norm += inputs[0].detach().flatten(1).norm(dim=1).mean().item()

    def _step_discriminator(self) -> Tensor:
        self.gradients, self.images_norm = {}, 0.0
        loss = super()._step_discriminator()
        for handle in (h for handles in self.handles.values() for h in handles):
            handle.remove()  # a weight that is not normalised would keep it
        self.handles = {}
        largest = max(self.lengths().values()) / self.images_norm
        self.bound_broken += not largest <= 1
        self.ratio = largest if math.isnan(largest) else max(self.ratio, largest)
        return loss

    def advance(self, steps: int) -> tuple[Tensor, Tensor]:
        """Train for some steps, fewer if a loss has grown beyond all measure; returns the last losses."""
        for _ in range(steps):
            losses = self.step()
            if not all(abs(loss) < GROWN for loss in losses):
                break
        return torch.tensor(losses[0]), torch.tensor(losses[1])

    def lengths(self) -> dict[str, float]:
        """Return by layer the length of the last step's gradient with respect to the weight that was used."""
        return dict(zip(self.gradients, torch.stack([g.norm() for g in self.gradients.values()]).tolist(), strict=True))


class Course:
    """What is kept of a training at some of its steps: the slope of the discriminator, gradients, variances."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.slope: list[float] = []
        self.gradient: dict[str, list[float]] = defaultdict(list)
        self.variance: dict[str, list[float]] = defaultdict(list)

    def record(self, run: Observed) -> None:
        self.steps.append(run.steps_done)
        self.slope.append(depth.slope(run.discriminator, run.images.pixels[:SLOPE_IMAGES]))
        for name, length in run.lengths().items():
            self.gradient[name].append(length)
        for name, measured in measure(run.discriminator).items():
            self.variance[name].append(measured.variance)

    def plain(self) -> dict[str, Any]:
        return {
            "step": self.steps,
            "slope": [_plain(value) for value in self.slope],
            "gradient": {name: [_plain(v) for v in values] for name, values in self.gradient.items()},
            "variance": {name: [_plain(v) for v in values] for name, values in self.variance.items()},
        }


@lru_cache(maxsize=4)
def images_of(name: str, size: int, cifar10_root: str) -> data.Images:
    """Return the images, read once in a process."""
    return data.load(name, size, cifar10_root)


@lru_cache(maxsize=4)
def scorer_of(name: str, size: int, cifar10_root: str, device: str) -> Scorer:
    """Return what compares samples with the images."""
    return Scorer(images_of(name, size, cifar10_root).pixels, device)


@lru_cache(maxsize=4)
def judge_of(name: str, size: int, cifar10_root: str) -> Judge:
    """Return the digits' own classifier, the same in every process: its seed is its own."""
    return Judge(images_of(name, size, cifar10_root))


def run_trial(
    trial: Trial, cifar10_root: str = "data", device: str = "cpu", inception_weights: Path | None = None
) -> dict[str, Any]:
    """Train, and return a record of plain numbers, infinities being written as strings.

    inception_weights: for the real FID and inception score, which are left out without them.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # where gradients vanish, arithmetic on what is left of them is very slow
    images = images_of(trial.settings.data, trial.settings.size, cifar10_root)
    run = WatchedRun(trial.settings, images, torch.device(device))
    record = record_of(trial, run, images, cifar10_root, inception_weights)
    return record | {"bound_ratio": _plain(run.ratio), "bound_broken_steps": run.bound_broken}


def record_of(
    trial: Trial, run: Observed, images: data.Images, cifar10_root: str, inception_weights: Path | None = None
) -> dict[str, Any]:
    """Train `run` as the trial says, and return its record; `images` are on the CPU."""
    cpu, wall = time.process_time(), time.perf_counter()
    course, diverged = Course(), False
    initial = {
        name: initial_variances(tuple(layer.weight.shape)) for name, layer in weight_layers(run.discriminator).items()
    }
    while run.steps_done < trial.steps and not diverged:
        # To the next step that is recorded: the first, each log_every-th after it, the last.
        ahead = min(-(run.steps_done - 1) % trial.log_every or trial.log_every, trial.steps - run.steps_done)
        diverged = not all(abs(loss.item()) < GROWN for loss in run.advance(ahead))
        course.record(run)
    record = {
        "key": trial.key,
        "study": trial.study,
        "settings": asdict(trial.settings),
        "steps": run.steps_done,
        "diverged": diverged,
        "course": course.plain(),
        "initial": {name: [v.lecun, v.xavier] for name, v in initial.items()},
    }
    if trial.scored:
        labels = images.labels[torch.arange(GENERATED) % len(images.labels)]
        record |= _scores(trial, images, run.sample(labels, seed=1), cifar10_root, inception_weights)
    return record | {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}


def _scores(trial: Trial, images: data.Images, samples: Tensor, root: str, weights: Path | None) -> dict[str, Any]:
    """Return all scores of the samples [GENERATED, ...], and some of the samples."""
    which = (trial.settings.data, trial.settings.size, root)
    scores = asdict(scorer_of(*which, samples.device.type).scores(samples))
    samples = samples.cpu()
    if trial.settings.data in ("digits", "mnist"):
        scores["classifier_frechet"] = judge_of(*which).frechet(samples)
    if weights is not None:
        fid, score = inception.fid_and_score(images.pixels, samples, weights)
        scores |= {"inception_fid": fid, "inception_score": score}
    shown = _bytes(samples[:SHOWN]) if trial.settings.seed == 0 else None
    return {"scores": {name: _plain(value) for name, value in scores.items()}, "samples": shown}


def _plain(value: float) -> float | str:
    """Return four significant digits, and as a string what JSON has no number for."""
    return float(f"{value:.4g}") if math.isfinite(value) else str(value)


def _bytes(pixels: Tensor) -> list[Any]:
    """Return images in [-1, 1] as nested lists of 0 to 255."""
    return pixels.nan_to_num().add(1).mul(127.5).round().to(torch.uint8).tolist()
