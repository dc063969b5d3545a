"""From tensors to launches: programs and their buffers are kept from call to call, outputs are passed by address."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import reduce
from operator import or_
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from bssn_fast import layout
from bssn_fast.backends import reference
from bssn_fast.backends.triton import kernels
from bssn_fast.backends.triton.fields import encode
from bssn_fast.backends.triton.geometry import geometry, power_of_two
from bssn_fast.backends.triton.prepared import Buffers, Cache, Prepared
from bssn_fast.backends.triton.program import Layer, backward_stages, build, stages

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
NUM_WARPS = 8
MAX_REGISTERS = 128
"""Two programs on a multiprocessor of 64K registers, so that one loads while the other adds. Not for fp64."""

MAX_LAYERS = 128
"""Layers of one launch: their outputs' addresses are kernel arguments, of which CUDA takes 4 KB. More take several."""

_cache = Cache()


def launch_mode() -> str:
    """Return "single" or "phases": BSSN_FAST_TRITON_LAUNCH, or what is known to work on this kind of device."""
    mode = os.environ.get("BSSN_FAST_TRITON_LAUNCH", "") or ("phases" if torch.version.hip else "single")
    if mode not in ("single", "phases"):
        raise ValueError(f"BSSN_FAST_TRITON_LAUNCH must be single or phases, not {mode!r}")
    return mode


def _addresses(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(x.data_ptr() for x in tensors)


def _arguments(addresses: Sequence[int] | dict[int, int], indices: Sequence[int]) -> tuple[int, ...]:
    """Return the encoded addresses at `indices`, padded to a power of two so that few kernels are compiled."""
    chosen = [encode(addresses[j]) for j in indices]
    return (*chosen, *chosen[-1:] * (power_of_two(len(chosen)) - len(chosen)))


def _bits(x: float) -> int:
    return struct.unpack("q", struct.pack("d", x))[0]


def _per_layer(vectors: Sequence[Any], two_sided: Sequence[bool]) -> list[tuple[Any, ...]]:
    rest = iter(vectors)
    return [tuple(next(rest) for _ in range(4 if both else 2)) for both in two_sided]


def _layers(
    weights: Sequence[Tensor],
    indices: Sequence[int],
    vectors: Sequence[tuple[int, ...]],
    dims: Sequence[int],
    two_sided: Sequence[bool],
    aligned: bool,
) -> tuple[list[list[Layer]], list[int]]:
    """Return the layers at `indices` in groups for a launch each, and the indices of those the kernels cannot address.

    Large layers come first, so that the waits at the end of a launch are for small ones.
    """
    snapshot, _ = layout.snapshot_offsets(tuple(tuple(w.shape) for w in weights), tuple(dims), tuple(two_sided))
    layers, others = [], []
    for j in sorted(indices, key=lambda j: -weights[j].numel()):
        w = weights[j]
        place = geometry(w.shape, w.stride(), dims[j], two_sided[j], w.element_size(), aligned)
        if place is None:
            others.append(j)
        else:
            layers.append(Layer(j, place, w.data_ptr(), vectors[j] if vectors else (), snapshot[j]))
    return [layers[start : start + MAX_LAYERS] for start in range(0, len(layers), MAX_LAYERS)], others


def _run(kernel: Any, prepared: Prepared, buffers: Buffers, arguments: tuple[Any, ...], **constants: Any) -> None:
    """Start the program's launches; `arguments` are those between the buffers and the first tile."""
    program = prepared.program
    options = {"num_warps": NUM_WARPS}
    if not torch.version.hip and buffers.scratch.dtype != torch.float64:
        options["maxnreg"] = MAX_REGISTERS
    try:
        for first_tile, n_tiles in program.launches:
            kernel[(n_tiles,)](
                prepared.layers,
                prepared.segments,
                buffers.counters,
                buffers.scratch,
                buffers.stats,
                *arguments,
                first_tile,
                SHAPES=program.shapes,
                N_SEGMENTS=program.n_segments,
                SINGLE=prepared.single,
                ACC=TYPES[buffers.scratch.dtype],
                **constants,
                **options,
            )
    except BaseException:
        _cache.clear()
        raise


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def forward(
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    dims: Sequence[int],
    two_sided: Sequence[bool],
    scale: float,
    eps: float,
    n_power_iterations: int,
    normalized: Sequence[Tensor],
    snapshot: Tensor,
    sigma: Tensor,
) -> None:
    """See `backends`."""
    if not weights:
        return
    single = launch_mode() == "single"
    iterate = n_power_iterations > 0
    inputs = (_addresses(weights), _addresses(vectors))
    outs = _addresses(normalized)
    aligned = reduce(or_, (*inputs[0], *inputs[1], *outs, snapshot.data_ptr())) % 16 == 0

    def make(write: bool) -> Callable[[], tuple[list[Prepared], list[int]]]:
        def programs() -> tuple[list[Prepared], list[int]]:
            groups, others = _layers(
                weights, range(len(weights)), _per_layer(inputs[1], two_sided), dims, two_sided, aligned
            )
            built = []
            for group in groups:
                tiles = [stages(x.geometry, iterate=iterate, write=write) for x in group]
                program = build(group, tiles, single=single, backward=False)
                built.append(Prepared(program, [x.position for x in group], single, sigma.device))
            return built, others

        return programs

    shapes = tuple((w.shape, w.stride()) for w in weights)
    key = ("forward", sigma.device, weights[0].dtype, inputs, shapes, tuple(dims), tuple(two_sided), aligned, single)
    with _on(sigma.device):
        for iteration in range(max(n_power_iterations, 1)):
            write = iteration + 1 >= n_power_iterations
            found, others = _cache.get((*key, iterate, write), sigma, make(write))
            for prepared, buffers in found:
                _run(
                    kernels.forward_kernel,
                    prepared,
                    buffers,
                    (snapshot, sigma, _arguments(outs, prepared.indices), _bits(scale), _bits(eps)),
                    ITERATE=iterate,
                    ALIGNED=aligned,
                    W_TYPE=TYPES[weights[0].dtype],
                    OUT_TYPE=TYPES[normalized[0].dtype],
                )
    stored = _per_layer(vectors, two_sided) if others else []
    for j in others:
        reference.forward(
            [weights[j]],
            list(stored[j]),
            [dims[j]],
            [two_sided[j]],
            scale,
            eps,
            n_power_iterations,
            [normalized[j]],
            snapshot[_snapshot_start(weights, dims, two_sided, j) :],
            sigma[j : j + 1],
        )


def _snapshot_start(weights: Sequence[Tensor], dims: Sequence[int], two_sided: Sequence[bool], j: int) -> int:
    shapes = tuple(tuple(w.shape) for w in weights)
    return layout.snapshot_offsets(shapes, tuple(dims), tuple(two_sided))[0][j][0]


def backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    layers: Sequence[int],
    dims: Sequence[int],
    two_sided: Sequence[bool],
    scale: float,
    snapshot: Tensor,
    sigma: Tensor,
    grad_weights: Sequence[Tensor],
) -> None:
    """See `backends`."""
    if not layers:
        return
    single = launch_mode() == "single"
    inputs = _addresses(weights)
    grad_addresses = dict(zip(layers, _addresses(grads), strict=True))
    outs = dict(zip(layers, _addresses(grad_weights), strict=True))
    aligned = reduce(or_, (*inputs, *grad_addresses.values(), *outs.values(), snapshot.data_ptr())) % 16 == 0

    def programs() -> tuple[list[Prepared], list[int]]:
        groups, others = _layers(weights, layers, [], dims, two_sided, aligned)
        built = []
        for group in groups:
            program = build(group, [backward_stages(x.geometry) for x in group], single=single, backward=True)
            built.append(Prepared(program, [x.position for x in group], single, sigma.device))
        return built, others

    shapes = tuple((w.shape, w.stride()) for w in weights)
    key = (
        "backward",
        sigma.device,
        weights[0].dtype,
        inputs,
        shapes,
        tuple(layers),
        tuple(dims),
        tuple(two_sided),
        aligned,
        single,
    )
    with _on(sigma.device):
        found, others = _cache.get(key, sigma, programs)
        for prepared, buffers in found:
            _run(
                kernels.backward_kernel,
                prepared,
                buffers,
                (
                    snapshot,
                    sigma,
                    _arguments(grad_addresses, prepared.indices),
                    _arguments(outs, prepared.indices),
                    _bits(scale),
                ),
                ALIGNED=aligned,
                W_TYPE=TYPES[weights[0].dtype],
                G_TYPE=TYPES[grads[0].dtype],
            )
    for j in others:
        n = list(layers).index(j)
        reference.backward(
            [grads[n]],
            [weights[j]],
            [0],
            [dims[j]],
            [two_sided[j]],
            scale,
            snapshot[_snapshot_start(weights, dims, two_sided, j) :],
            sigma[j : j + 1],
            [grad_weights[n]],
        )
