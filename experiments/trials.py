"""One training with everything that the claims need measured, and the pool that runs many of them."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from gan import data
from gan.metrics import Judge
from gan.networks import weight_layers
from gan.training import Run
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from bssn_fast.diagnostics import History
from experiments import inception
from experiments.plan import Trial
from experiments.spectra import write_whole

SLOPE_IMAGES = 64
SHOWN = 10
"""Images of each trial with seed 0 that its record keeps."""
GROWN = 1e3
"""A training with a loss beyond this has diverged, though its numbers may still be finite."""


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
        self.ratio: dict[str, float] = dict.fromkeys(weight_layers(self.discriminator), 0.0)
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
        self.images_norm += inputs[0].detach().flatten(1).norm(dim=1).mean().item()

    def _step_discriminator(self) -> float:
        self.gradients, self.images_norm = {}, 0.0
        loss = super()._step_discriminator()
        for handle in (h for handles in self.handles.values() for h in handles):
            handle.remove()  # a weight that is not normalised would keep it
        self.handles = {}
        ratios = {name: (g.norm() / self.images_norm).item() for name, g in self.gradients.items()}
        self.bound_broken += any(not r <= 1 for r in ratios.values())
        for name, r in ratios.items():
            self.ratio[name] = r if math.isnan(r) else max(self.ratio[name], r)
        return loss

    def slope(self) -> float:
        """Return the mean length of dD/dx at SLOPE_IMAGES real images, in evaluation: no vector changes."""
        self.discriminator.eval()
        x = self.images.pixels[:SLOPE_IMAGES].clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.discriminator(x, self.images.labels[:SLOPE_IMAGES]).sum(), x)
        self.discriminator.train()
        return gradient.flatten(1).norm(dim=1).mean().item()


@lru_cache(maxsize=4)
def images_and_judge(name: str, size: int, cifar10_root: str) -> tuple[data.Images, Judge]:
    """Return the images and their judge, the same in every process: the classifier has a seed of its own."""
    images = data.load(name, size, cifar10_root)
    return images, Judge(images)


def run_trial(
    trial: Trial, cifar10_root: str = "data", device: str = "cpu", inception_weights: Path | None = None
) -> dict[str, Any]:
    """Train, and return a record of plain numbers, infinities being written as strings.

    inception_weights: for the real FID and inception score, which are left out without them.
    """
    torch.set_num_threads(1)
    images, judge = images_and_judge(trial.settings.data, trial.settings.size, cifar10_root)
    cpu, wall = time.process_time(), time.perf_counter()
    run = WatchedRun(trial.settings, images, torch.device(device))
    history, slopes, frechet, diverged = History(), [], [], False
    evaluate_every = max(1, trial.steps // trial.evaluations)
    while run.steps_done < trial.steps and not diverged:
        losses = run.step()
        diverged = not all(abs(loss) < GROWN for loss in losses)
        if (run.steps_done - 1) % trial.log_every == 0 or run.steps_done == trial.steps:
            history.record(run.discriminator, run.steps_done)
            slopes.append(run.slope())
        if run.steps_done % evaluate_every == 0:
            frechet.append((run.steps_done, judge.frechet(run.sample(images.labels, seed=1).cpu())))
    samples = run.sample(images.labels, seed=1).cpu()
    quality = asdict(judge.quality(samples))
    if inception_weights is not None:
        fid, score = inception.fid_and_score(images.pixels, samples, inception_weights)
        quality |= {"inception_fid": fid, "inception_score": score}
    return {
        "key": trial.key,
        "settings": asdict(trial.settings),
        "steps": run.steps_done,
        "diverged": diverged,
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "quality": {name: _plain(value) for name, value in quality.items()},
        "frechet": [(step, _plain(value)) for step, value in frechet],
        "samples": _bytes(samples[:SHOWN]) if trial.settings.seed == 0 else None,
        "bound_ratio": {name: _plain(value) for name, value in run.ratio.items()},
        "bound_broken_steps": run.bound_broken,
        "history": {
            "step": history.steps,
            "slope": [_plain(value) for value in slopes],
            "gradient": {name: [_plain(m.gradient) for m in ms] for name, ms in history.layers.items()},
            "variance": {name: [_plain(m.variance) for m in ms] for name, ms in history.layers.items()},
            "sigma": {name: [_plain(m.sigma) for m in ms] for name, ms in history.layers.items()},
            "initial": {name: tuple(initial) for name, initial in history.initial.items()},
        },
    }


def _plain(value: float | None) -> float | str | None:
    """Return four significant digits, and as a string what JSON has no number for."""
    if value is None or math.isfinite(value):
        return None if value is None else float(f"{value:.4g}")
    return str(value)


def _bytes(pixels: Tensor) -> list[Any]:
    """Return images in [-1, 1] as nested lists of 0 to 255."""
    return pixels.nan_to_num().add(1).mul(127.5).round().to(torch.uint8).tolist()


def run_all(trials: list[Trial], folder: Path, workers: int, *options: Any) -> list[dict[str, Any]]:
    """Run the trials that have no file in `folder` yet, `workers` at a time, and return the records of all.

    options: of `run_trial`, behind the trial.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [trial for trial in trials if not _file(folder, trial).exists()]
    progress = tqdm(total=len(trials), initial=len(trials) - len(missing), desc="trainings", unit="run", smoothing=0.05)
    with progress, ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            futures = {pool.submit(run_trial, trial, *options): trial for trial in missing}
            for future in as_completed(futures):
                write_whole(_file(folder, futures[future]), json.dumps(future.result()))
                progress.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [json.loads(_file(folder, trial).read_text()) for trial in trials]


def _file(folder: Path, trial: Trial) -> Path:
    return folder / f"{trial.key}.json"
