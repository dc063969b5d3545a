"""What happens where a kernel does not run: a device has no room for it, or it is interrupted (run by test_triton.py).

In Triton's interpreter.
"""

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from triton.runtime.errors import OutOfResources
from triton_interpreted import LAYERS, Problem, check

import bssn_fast
from bssn_fast import backends
from bssn_fast.backends.triton import kernels, launch, prepared


class Refused:
    """A kernel that a device has no room for. A launch of it would be a TypeError."""

    def __init__(self, good_kernel=None, good=0):
        self.good_kernel, self.good = good_kernel, good

    def warmup(self, *arguments, **options):
        self.good -= 1
        if self.good < 0:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return self.good_kernel.warmup(*arguments, **options)


@pytest.fixture
def preferred(monkeypatch):
    """Triton is the CPU's default, then the reference."""
    monkeypatch.setitem(backends._PREFERRED, "cpu", ("triton", "reference"))
    monkeypatch.delenv("BSSN_FAST_BACKEND", raising=False)
    backends.forget()
    yield
    backends.forget()


@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_kernel"])
def test_the_next_backend_takes_over_from_a_kernel_that_cannot_be_loaded(monkeypatch, preferred, kernel):
    """Also between a forward and its backward; to the user it is as if that backend had done it all."""
    model = bssn_fast.apply(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 2)))
    twin = bssn_fast.apply(copy.deepcopy(model), backend="reference")
    monkeypatch.setattr(kernels, kernel, Refused())
    x = torch.randn(3, 2, 4, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for m in (model, twin):
                m(x).sum().backward()
    text = r"'triton'.* cpu: .*OutOfResources: .*shared memory.*From now on 'reference'.*without this warning"
    # Triton 3.6's interpreter does what NumPy warns of.
    messages = [str(w.message) for w in caught if not issubclass(w.category, DeprecationWarning)]
    assert [bool(re.search(text, message)) for message in messages] == [True]
    for mine, others in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, others.grad)
    for mine, others in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, others)


@pytest.mark.parametrize(
    ("kernel", "good", "n_power_iterations"),
    [("table_kernel", 0, 1), ("forward_kernel", 0, 1), ("forward_kernel", 1, 2)],
)
def test_a_kernel_that_cannot_be_loaded_has_changed_nothing(monkeypatch, kernel, good, n_power_iterations):
    """Nor when it is the second one of a call that has failed; and it is said at every call."""
    monkeypatch.setattr(launch, "_cache", prepared.Cache())
    problem = Problem(LAYERS[:3], n_power_iterations=n_power_iterations)
    before = [v.clone() for v in problem.vectors]
    for _ in range(2):
        monkeypatch.setattr(kernels, kernel, Refused(kernels.forward_kernel, good))
        with pytest.raises(bssn_fast.BackendUnavailableError, match=r"'triton'.*OutOfResources"):
            problem.forward()
        good = 0  # what has been loaded stays so
    for v, stored in zip(problem.vectors, before, strict=True):
        assert torch.equal(v, stored)


def test_a_failed_launch_leaves_nothing_behind(monkeypatch):
    monkeypatch.setenv("BSSN_FAST_TRITON_LAUNCH", "single")
    problem = Problem(LAYERS[:3]).forward()
    whole = kernels.forward_kernel

    class Interrupted:
        def __getitem__(self, grid):
            def run(*arguments, **options):
                arguments[2].add_(1)  # as if a tile had been taken and never run
                raise KeyboardInterrupt

            return run

    monkeypatch.setattr(kernels, "forward_kernel", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        problem.forward()
    monkeypatch.setattr(kernels, "forward_kernel", whole)
    check(problem)


def test_unknown_mode(monkeypatch):
    monkeypatch.setenv("BSSN_FAST_TRITON_LAUNCH", "both")
    with pytest.raises(ValueError, match="must be single or phases"):
        Problem(LAYERS[:1]).forward()
