"""Many trainings on a GPU in one process, each step one captured CUDA graph, for a given time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gan.training import Run
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from experiments.files import write_whole
from experiments.plan import Trial
from experiments.trainings.pool import file_of
from experiments.trainings.trial import images_of, record_of

WARM_UP = 3
"""Steps before the capture: what is allocated or compiled in first calls cannot be captured. They train as well."""

Losses = tuple[Tensor, Tensor]


def capture(step: Callable[[], Losses]) -> Callable[[], Losses]:
    """Return what replays `step`: the same tensors every time, with new contents."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = step()

    def replay() -> Losses:
        graph.replay()
        return losses

    return replay


class CapturedRun(Run):
    """A run whose step, with all its random numbers, is a replayed graph. Its losses are read now and then only."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for optimizer in (self.optimizer_generator, self.optimizer_discriminator):
            for group in optimizer.param_groups:
                group["capturable"] = self.device.type == "cuda"
        self._blend = get_ema_multi_avg_fn(self.settings.ema_decay)
        self._replay = capture(self._whole_step)
        self.steps_done = WARM_UP

    def _whole_step(self) -> Losses:
        for _ in range(self.settings.critic_steps):
            loss = self._step_discriminator()
        return loss, self._step_generator()

    def _update_average(self) -> None:
        """Average without asking how often that was done, for which the host would wait for the device."""
        pairs = zip(self.average.module.state_dict().values(), self.generator.state_dict().values(), strict=True)
        ours, theirs = zip(*[(a, b) for a, b in pairs if a.is_floating_point()], strict=True)
        self._blend(list(ours), list(theirs), 0)

    def step(self) -> tuple[float, float]:
        losses = self.advance(1)
        return losses[0].item(), losses[1].item()

    def advance(self, steps: int) -> Losses:
        """Train for some steps without waiting for them; returns the last losses, which later steps overwrite."""
        for _ in range(steps):
            losses = self._replay()
        self.steps_done += steps
        return losses

    def lengths(self) -> dict[str, float]:
        """Return nothing: gradients with respect to normalised weights do not outlive a graph."""
        return {}


def run_for(trials: list[Trial], folder: Path, seconds: float, cifar10_root: str, device: str = "cuda") -> int:
    """Run the trials that have no file in `folder` yet, one after another, and begin none after `seconds`.

    Returns how many are still missing: the same call goes on with them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [trial for trial in trials if not file_of(folder, trial).exists()]
    started = time.perf_counter()
    done = 0
    for trial in missing:
        if time.perf_counter() - started > seconds:
            break
        images = images_of(trial.settings.data, trial.settings.size, cifar10_root)
        run = CapturedRun(trial.settings, images, torch.device(device))
        write_whole(file_of(folder, trial), json.dumps(record_of(trial, run, images, cifar10_root)))
        done += 1
        print(f"{done} of {len(missing)}: {trial.key}, {time.perf_counter() - started:.0f} s", flush=True)
    return len(missing) - done
