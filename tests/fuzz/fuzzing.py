"""What the fuzzers share: how long they run, and the check that a model computes what plain torch does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from support import assert_same_gradients, norms, plain_copy
from torch import Tensor, nn

import bssn_fast

FACTOR = float(os.environ.get("BSSN_FAST_FUZZ", "1"))
"""How many times as many cases as by default are tried."""

TESTS = Path(__file__).parents[1]


def cases(count: int) -> range:
    """The seeds to try; the first ones are always the same."""
    return range(max(1, round(count * FACTOR)))


class Small(nn.Module):
    """Two directions, one, of two blocks, and a layer that does not follow autocast, in few elements."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)
        self.linear = nn.Linear(12, 4)
        self.embed = nn.Embedding(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).tanh().flatten(1)
        return (self.linear(x).tanh() * self.embed(torch.arange(len(x)) % 3)).sum(1)


def small(variant: str = "bssn", **settings: object) -> nn.Module:
    return bssn_fast.apply(Small().double(), variant, blocks={"linear": 2}, **settings)


def inputs(n: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 2, 3, 3, dtype=dtype)


def assert_right(model: nn.Module, x: Tensor, steps: int = 1) -> None:
    """Whatever has happened to a normalised model: it computes what its weights and vectors say.

    Training, evaluation after writes that torch does not count, blocks, and again; the model itself is left alone.
    """
    twin = plain_copy(model)
    for step in range(steps):
        for net in (model, twin):
            net.train().zero_grad()
            net(x).square().sum().backward()
        assert_same_gradients(model, twin, 1e-8)
        assert_same_vectors(model, twin)
        for net in (model, twin):
            net.eval()
        torch.testing.assert_close(model(x), twin(x), msg=lambda m, step=step: f"evaluation {step}: {m}")
        with torch.no_grad(), bssn_fast.cached(model):
            torch.testing.assert_close(model(x), twin(x))
        write_single_elements(model), write_single_elements(twin)
        with torch.no_grad():
            found = model(x)
            for name, norm in norms(model).items():  # better vectors may have been found
                norms(twin)[name].vectors = tuple(v.clone() for v in norm.buffers())
            torch.testing.assert_close(found, twin(x), msg=lambda m, step=step: f"after a write {step}: {m}")


def write_single_elements(model: nn.Module) -> None:
    """Change one element of each weight a little, in a way that torch does not count."""
    for p in model.parameters():
        p.data[(-1,) * p.ndim] += 0.01


def assert_same_vectors(model: nn.Module, twin: nn.Module) -> None:
    plain = norms(twin)
    for name, norm in norms(model).items():
        for ours, theirs in zip(norm.buffers(), plain[name].vectors, strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"vectors of {name}: {m}")


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.allclose(a[k], b[k]) for k in a)


def run_in_subprocess(code: str, *args: str, timeout: float = 300) -> str:
    """Run code that may crash or hang; return what it prints. A crash, a hang or an exception fails the test."""
    path = os.pathsep.join([str(Path(__file__).parent), str(TESTS), *sys.path])
    found = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code, *args],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert found.returncode == 0, f"exit status {found.returncode}\n{found.stdout[-2000:]}\n{found.stderr[-6000:]}"
    return found.stdout
