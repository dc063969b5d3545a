"""Instructions of the host for a training step: python -m benchmarks.instructions, with Valgrind at hand.

Times of microseconds are noisy; counted instructions are not. What a step of 20 linear layers of 4 x 4 takes, forward
(each weight is read once) and backward, is the difference between two runs of different length, by the steps between.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import subprocess
import sys

import torch
from torch import nn

import bssn_fast

LAYERS, WIDTH = 20, 4
SHORT, LONG = 20, 120
NORMS = ("none", "torch", "bssn_fast")


class Weights(nn.Module):
    """A model that does nothing but read its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])

    def forward(self) -> list[torch.Tensor]:
        return [layer.weight for layer in self.layers]


def train(norm: str, steps: int) -> None:
    """Take so many steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Weights()
    if norm == "torch":
        for layer in model.layers:
            nn.utils.parametrizations.spectral_norm(layer)
    elif norm == "bssn_fast":
        bssn_fast.apply(model, "sn")
    parameters = list(model.parameters())  # which are looked for once, as an optimizer does
    grads = [torch.ones(WIDTH, WIDTH) for _ in range(LAYERS)]
    gc.freeze()  # or a collection now and then would look at all that torch has imported
    for _ in range(steps):
        torch.autograd.backward(model(), grads)
        for parameter in parameters:
            parameter.grad = None


def count(norm: str, steps: int) -> int:
    """Return the instructions of a whole run."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable]
    run = subprocess.run(
        [*command, "-m", "benchmarks.instructions", "--train", norm, "--steps", str(steps)],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"Collected : (\d+)", run.stderr)
    if found is None:
        raise RuntimeError(f"Valgrind has counted nothing:\n{run.stderr}")
    return int(found.group(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", choices=NORMS, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=SHORT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args.train, args.steps)
        return
    for norm in NORMS:
        instructions = (count(norm, LONG) - count(norm, SHORT)) / (LONG - SHORT)
        print(f"{norm:10s} {instructions / 1e6:6.2f} million instructions a step", flush=True)


if __name__ == "__main__":
    main()
