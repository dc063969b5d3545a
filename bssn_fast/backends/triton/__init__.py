"""Triton: all layers in one launch, forward and backward, on NVIDIA and AMD GPUs (`backends` documents the contract).

BSSN_FAST_TRITON_LAUNCH=single runs all phases in one launch, in which tiles wait for those they build on;
BSSN_FAST_TRITON_LAUNCH=phases starts one launch per phase. Default: single on NVIDIA GPUs; phases on AMD, where
waiting within a launch is untested.

BSSN_FAST_TRITON_PLAN=registers has small models' rows stay in registers from the power iteration until they are
written, where they fit and all phases are one launch. Default: tiles, of which each reads its weights.

With TRITON_INTERPRET=1, CPU tensors are served too, slowly, for tests.

Layers that the kernels do not address (kernel dimensions that do not form one stride, more than 2048 kernel positions
in two directions, no elements) are computed by the reference.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from bssn_fast.laws import Laws
from bssn_fast.layout import Batch

DEVICES: tuple[str, ...] = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


MIN_VERSION = (3, 4)
"""Triton's before look nothing up in a tuple of constants (3.3) or know no tuples of arguments (3.2)."""

MIN_CAPABILITY = (8, 0)
"""NVIDIA's GPUs that Triton supports begin here."""


def why_unavailable(device: torch.device) -> str | None:
    """None if a small kernel of ours compiles and loads.

    Being able to import Triton says little: it needs a C compiler and Python's headers for its launchers, and an
    assembler and a driver that know the GPU. Whether it compiles the large kernels too, a call finds out.
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; it comes with torch for CUDA and ROCm, or: pip install triton"
    if device.type != "cuda":
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU; check the driver and that torch was installed with CUDA or ROCm"
    capability = torch.cuda.get_device_capability(device)
    if not torch.version.hip and capability < MIN_CAPABILITY:
        return f"Triton needs a GPU of compute capability 8.0, this one has {capability[0]}.{capability[1]}"
    try:
        import triton

        if tuple(map(int, triton.__version__.split(".")[:2])) < MIN_VERSION:
            return (
                f"Triton {triton.__version__} is too old: 3.4 is needed, which torch 2.8 brings; on NVIDIA GPUs the "
                "backend 'cuda' does without, once installed where nvcc is"
            )
        from bssn_fast.backends.triton import kernels

        with torch.cuda.device(device):
            kernels.compile_probe()
    except Exception as error:  # of whatever kind: the message says what is missing
        text = " ".join(str(error).split())[:300]
        return f"Triton cannot compile for this GPU ({type(error).__name__}: {text})"
    return None


def forward(
    batch: Batch,
    weights: list[Tensor],
    vectors: list[Tensor],
    laws: Laws,
    eps: float,
    n_power_iterations: int,
    normalized: list[Tensor],
    snapshot: Tensor,
    sigma: Tensor,
) -> None:
    from bssn_fast.backends.triton import launch

    launch.forward(batch, weights, vectors, laws, eps, n_power_iterations, normalized, snapshot, sigma)


def backward(
    batch: Batch,
    grads: list[Tensor],
    weights: list[Tensor],
    layers: list[int],
    laws: Laws,
    snapshot: Tensor,
    sigma: Tensor,
    grad_weights: list[Tensor],
    grad_gains: Tensor | None,
) -> None:
    from bssn_fast.backends.triton import launch

    launch.backward(batch, grads, weights, layers, laws, snapshot, sigma, grad_weights, grad_gains)
