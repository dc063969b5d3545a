"""What the host does in a training step, in instructions and seconds: python -m benchmarks.instructions, with Valgrind.

Times of microseconds are noisy; counted instructions are not. A step of 20 linear layers of 4 x 4, forward (each weight
is read once) and backward, in `sn`:

    none       without normalisation: the model's call, the reads, gradients on their way to the weights
    node       one torch.autograd.Function from all weights to as many other tensors, which computes nothing
    torch      torch's own parametrization
    bssn_fast  on the CPU
    empty      as on a GPU, with kernels that do nothing: the CUDA backend up to its call of C++, results in memory
               that torch allocates each time

Instructions of a step are the difference between two runs of different length, by the steps between. Seconds are the
medians of the thread's CPU time; all take turns in one process.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import bssn_fast
from bssn_fast.backends import cuda, extension
from bssn_fast.calls import memory

LAYERS, WIDTH = 20, 4
SHORT, LONG = 20, 120
TURNS, LAPS = 60, 50
NORMS = ("none", "node", "torch", "bssn_fast", "empty")


class Weights(nn.Module):
    """A model that does nothing but read its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])

    def forward(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]


class Node(torch.autograd.Function):
    """What any normalisation of all weights at once, written in Python, asks of torch's autograd."""

    @staticmethod
    def forward(ctx: Any, results: list[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*weights)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.saved_tensors


class OneNode(Weights):
    def forward(self) -> list[Tensor]:
        weights = [layer.weight for layer in self.layers]
        return list(Node.apply(list(map(Tensor.detach, weights)), *weights))


def launch_nothing() -> None:
    """Let the CUDA backend serve CPU tensors, with kernels that do nothing."""
    kernels = ("cuda_forward", "cuda_backward", "cuda_forward_workspace", "cuda_backward_workspace")
    extension.module = SimpleNamespace(**vars(extension.module), **dict.fromkeys(kernels, lambda *arguments: 0))
    cuda.DEVICES = ("cuda", "cpu")
    cuda.why_unavailable = lambda device: None
    cuda._stream = lambda device: 0


def step_of(norm: str) -> Callable[[], None]:
    """Return a function that takes a step."""
    torch.manual_seed(0)
    model = OneNode() if norm == "node" else Weights()
    if norm == "torch":
        for layer in model.layers:
            nn.utils.parametrizations.spectral_norm(layer)
    elif norm == "bssn_fast":
        bssn_fast.apply(model, "sn")
    elif norm == "empty":
        bssn_fast.apply(model, "sn", backend="cuda")
    parameters = list(model.parameters())  # which are looked for once, as an optimizer does
    grads = [torch.ones(WIDTH, WIDTH) for _ in range(LAYERS)]

    def step() -> None:
        torch.autograd.backward(model(), grads)
        for parameter in parameters:
            parameter.grad = None

    return step


def take(step: Callable[[], None], steps: int, norm: str) -> None:
    memory._COUNTS = norm != "empty"  # whether buffers are used again, as on a CPU
    for _ in range(steps):
        step()


def train(norm: str, steps: int) -> None:
    """Take so many steps, from the first on that is like all others; Valgrind begins to count there."""
    step = step_of(norm)
    gc.freeze()  # or a collection now and then would look at all that torch has imported
    take(step, SHORT, norm)
    subprocess.run(["callgrind_control", "--instr=on", str(os.getpid())], check=True, stdout=subprocess.DEVNULL)
    take(step, steps, norm)


def count(norm: str, steps: int) -> int:
    """Return the instructions of a whole run."""
    valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--callgrind-out-file=/dev/null"]
    run = subprocess.run(
        [*valgrind, sys.executable, "-m", "benchmarks.instructions", "--train", norm, "--steps", str(steps)],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"Collected : (\d+)", run.stderr)
    if found is None:
        raise RuntimeError(f"Valgrind has counted nothing:\n{run.stderr}")
    return int(found.group(1))


def seconds(norms: Sequence[str]) -> dict[str, float]:
    """Return the median CPU time of a step of each."""
    steps = {norm: step_of(norm) for norm in norms}
    found: dict[str, list[float]] = {norm: [] for norm in norms}
    gc.freeze()
    for _ in range(TURNS):
        for norm, step in steps.items():
            take(step, LAPS // 10, norm)
            start = time.thread_time()
            take(step, LAPS, norm)
            found[norm].append((time.thread_time() - start) / LAPS)
    return {norm: statistics.median(times[TURNS // 10 :]) for norm, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, help="a CSV file to which the figures are added")
    parser.add_argument("--label", default="", help="of these figures there: what was measured")
    parser.add_argument("--seconds", action="store_true", help="nothing else, without Valgrind")
    parser.add_argument("--only", choices=NORMS, nargs="+", default=NORMS)
    parser.add_argument("--train", choices=NORMS, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=SHORT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    launch_nothing()
    if args.train:
        train(args.train, args.steps)
        return
    times = seconds(args.only)
    for norm in args.only:
        counted = "" if args.seconds else f"{(count(norm, LONG) - count(norm, SHORT)) / (LONG - SHORT) / 1e6:.2f}"
        taken = f"{1e6 * times[norm]:.0f}"
        print(f"{norm:10s} {counted:>6s} million instructions {taken:>6s} microseconds a step", flush=True)
        if args.to:
            with args.to.open("a", newline="") as file:
                csv.writer(file).writerow((args.label, norm, counted, taken))


if __name__ == "__main__":
    main()
