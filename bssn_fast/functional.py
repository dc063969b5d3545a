"""Differentiable normalisation of many weights in one call, without modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bssn_fast import reference
from bssn_fast.backends import Backend
from bssn_fast.calls import composite
from bssn_fast.calls.arguments import WEIGHT_DTYPES, check_settings, check_weight, positive, refuse_trained
from bssn_fast.calls.normalizer import Normalizer
from bssn_fast.distributed.sharded import is_sharded, refuse_sharded
from bssn_fast.laws import AT_MOST, CONSTANT, GAIN, Law
from bssn_fast.layout import compute_dtype, fits_kernels, has_plain_memory, is_plain, vector_sizes
from bssn_fast.tracing.recording import is_exporting


def normalize(
    weights: Sequence[Tensor],
    vectors: Sequence[Sequence[Tensor]],
    *,
    dims: int | Sequence[int] = 0,
    scale: float | Sequence[float | None] | None = None,
    at_most: float | Sequence[float | None] | None = None,
    gains: Sequence[Tensor | None] | None = None,
    eps: float = 1e-12,
    n_power_iterations: int = 1,
    dtype: torch.dtype | None = None,
    backend: Backend = "",
) -> tuple[list[Tensor], Tensor]:
    """Multiply weights by functions of their spectral norms, all in one call: scale / sigma or another law.

    Args:
        weights: n >= 1 tensors of one device and one dtype (float32, float64, bfloat16, float16) of shape
            [c_out, c_in, *kernel], or [c_in, c_out, *kernel] where the layer's dim is 1.
        vectors: for each weight (u_out [c_out], v_out [c_in k]) for one direction, or (u_out, v_out, u_in [c_in],
            v_in [c_out k]) for the mean of both. k is the number of kernel positions. Contiguous unit vectors, float64
            for float64 weights, else float32. Updated in place, unless `n_power_iterations` is 0.
        dims: the output dimension, 0 or 1, of all weights or of each.
        scale: of the weights that have no other law; 1 by default. A number for all, or one or None for each.
        at_most: an upper bound: the weight becomes min(1, at_most / sigma) W. A number for all, or one or None for
            each.
        gains: for each weight None or a real tensor of one number, gamma: the weight becomes gamma W / sigma, which is
            differentiable with respect to gamma too.
        eps: smallest length that a vector is divided by.
        n_power_iterations: power iterations before sigma is computed; 0 evaluates with the vectors as they are.
        dtype: of the results; by default that of the weights.
        backend: "reference", "cpu", "triton" or "cuda"; empty for the default of the device.

    Returns:
        The normalised weights and sigma [n]. The weights are differentiable any number of times; u and v count as
        constants. Sigma carries no gradient.

    In transforms of torch.func, where forward-mode derivatives are wanted, and under torch.export or torch.jit.trace,
    plain operations compute the same.

    A zero weight gives zeros and sigma 0. A weight with infinities or NaN gives NaN. Neither changes its vectors.

    Raises ValueError or TypeError for arguments that do not fit, before any vector has changed.
    """
    weights, groups = list(weights), [tuple(v) for v in vectors]
    dims = [dims] * len(weights) if isinstance(dims, int) else list(dims)
    eps, n_power_iterations = check_settings(eps, n_power_iterations)
    if not weights:
        raise ValueError("there are no weights to normalise")
    if not len(weights) == len(groups) == len(dims):
        raise ValueError(f"{len(weights)} weights, {len(groups)} tuples of vectors and {len(dims)} dims do not match")
    for j, (weight, group, dim) in enumerate(zip(weights, groups, dims, strict=True)):
        check_weight(weight, dim, f"weights[{j}]")
        refuse_sharded(weight, f"weights[{j}]")
        if not fits_kernels(weight, dim):
            raise ValueError(
                f"weights[{j}]: {weight.dtype} of shape {tuple(weight.shape)} with output dimension {dim}; only real "
                "weights of two dimensions or more, with output dimension 0 or 1, are normalised together. Use "
                "bssn_fast.apply or bssn_fast.spectral_norm on a layer"
            )
        check_vectors(weights[0], weight, group, dim, j)
    laws, tensors = _laws(len(weights), scale, at_most, gains)
    dtype = dtype or weights[0].dtype
    if dtype not in WEIGHT_DTYPES:
        raise TypeError(f"results of {dtype} are not supported; choose float32, float64, bfloat16 or float16")
    two_sided, flat = [len(group) == 4 for group in groups], [v for group in groups for v in group]
    if torch.compiler.is_dynamo_compiling():
        from bssn_fast.tracing import node  # with it comes torch's compiler, which takes long to import

        if node.in_transform():
            return _in_plain_operations(weights, groups, dims, laws, tensors, eps, n_power_iterations, dtype)
        kinds, numbers = [law.kind for law in laws], [law.number for law in laws]
        settings = (eps, n_power_iterations, dtype, backend, 1)
        n = len(weights)
        results = node.normalize(
            weights, flat, dims, two_sided, [1] * n, [False] * n, kinds, numbers, tensors, *settings
        )
        return list(results[:-1]), results[-1]
    if is_exporting() or composite.in_transform() or composite.has_tangents([*weights, *tensors]):
        return _in_plain_operations(weights, groups, dims, laws, tensors, eps, n_power_iterations, dtype)
    check_memory(weights, groups, tensors, n_power_iterations)
    normalizer = Normalizer(weights, dims, two_sided, laws=laws, eps=eps, backend=backend)
    values = normalizer.compute(weights, flat, n_power_iterations, dtype, tensors)
    return normalizer.attach(values, weights, tensors), values.sigma.clone()


def _in_plain_operations(
    weights: Sequence[Tensor],
    groups: Sequence[tuple[Tensor, ...]],
    dims: Sequence[int],
    laws: Sequence[Law],
    gains: Sequence[Tensor],
    eps: float,
    n_power_iterations: int,
    dtype: torch.dtype,
) -> tuple[list[Tensor], Tensor]:
    """Do the same for those who do not see what kernels do: torch.func, forward-mode derivatives, export and trace."""
    normalized, sigmas = [], []
    numbers = iter([gain.to(weights[0].device, compute_dtype(weights[0].dtype)) for gain in gains])
    each = [(next(numbers) if law.kind == GAIN else law.number, law.kind == AT_MOST) for law in laws]
    for weight, group, dim, (scale, at_most) in zip(weights, groups, dims, each, strict=True):
        w = weight.to(compute_dtype(weight.dtype))
        result, new, sigma = reference.normalize(
            w, group, dim, scale=scale, at_most=at_most, eps=eps, n_power_iterations=n_power_iterations
        )
        if n_power_iterations:
            for old, vector in zip(group, new, strict=True):
                composite.write(old, vector)
        normalized.append(result.to(dtype))
        sigmas.append(sigma.detach())
    return normalized, torch.stack(sigmas)


def _laws(n: int, scale: object, at_most: object, gains: object) -> tuple[list[Law], list[Tensor]]:
    """Return each weight's law, and the tensors of gains; raise ValueError or TypeError for what does not fit."""
    given = [_each(n, scale, "scale"), _each(n, at_most, "at_most"), _each(n, gains, "gains")]
    laws, tensors = [], []
    for j, (c, bound, gain) in enumerate(zip(*given, strict=True)):
        if sum(x is not None for x in (c, bound, gain)) > 1:
            raise ValueError(f"weights[{j}] is given more than one of scale, at_most and gains; keep one of them")
        if gain is not None:
            if not isinstance(gain, Tensor) or gain.numel() != 1 or not gain.is_floating_point():
                raise TypeError(f"gains[{j}] must be a real tensor of one number, not {gain!r}")
            if is_sharded(gain):
                raise TypeError(f"gains[{j}] is a DTensor; give its `full_tensor()`")
            tensors.append(gain)
            laws.append(Law(GAIN, 0.0))
        elif bound is not None:
            laws.append(Law(AT_MOST, positive(bound, "at_most")))
        else:
            laws.append(Law(CONSTANT, 1.0 if c is None else positive(c, "scale")))
    return laws, tensors


def _each(n: int, values: Any, name: str) -> list[Any]:
    """Return a value for each weight."""
    if not isinstance(values, (list, tuple)):
        if name == "gains" and values is not None:
            raise TypeError("gains must be a list with a tensor or None for each weight")
        refuse_trained(values, name)
        return [values] * n
    if len(values) != n:
        raise ValueError(f"{name} has {len(values)} values for {n} weights")
    for value in values if name != "gains" else ():
        refuse_trained(value, name)
    return list(values)


def check_vectors(first: Tensor, weight: Tensor, group: tuple[Tensor, ...], dim: int, j: int) -> None:
    """Raise ValueError or TypeError for the j-th weight's vectors if they do not fit it, or it the first weight."""
    if weight.dtype != first.dtype or weight.device != first.device:
        raise TypeError(
            f"weights[{j}] is {weight.dtype} on {weight.device}, weights[0] {first.dtype} on {first.device}; "
            "normalise each kind in a call of its own"
        )
    if len(group) not in (2, 4):
        raise ValueError(f"vectors[{j}] has {len(group)} vectors; give (u_out, v_out) or (u_out, v_out, u_in, v_in)")
    sizes = vector_sizes(weight.shape, dim, len(group) == 4)
    for vector, size in zip(group, sizes, strict=True):
        if not isinstance(vector, Tensor):
            raise TypeError(f"vectors[{j}] must be tensors, not {type(vector).__name__}")
        if tuple(vector.shape) != (size,):
            raise ValueError(
                f"vectors[{j}] has a vector of shape {tuple(vector.shape)} where ({size},) belongs to "
                f"a weight of shape {tuple(weight.shape)} and dim {dim}"
            )
        if vector.dtype != compute_dtype(weight.dtype) or vector.device != weight.device:
            raise TypeError(
                f"vectors[{j}] is {vector.dtype} on {vector.device}; a weight of {weight.dtype} on {weight.device} "
                f"needs {compute_dtype(weight.dtype)} on {weight.device}"
            )
        if not vector.is_contiguous() or vector.requires_grad:
            raise ValueError(f"vectors[{j}] must be contiguous tensors that require no gradient")


def check_memory(
    weights: Sequence[Tensor], groups: Sequence[tuple[Tensor, ...]], gains: Sequence[Tensor], n_power_iterations: int
) -> None:
    """Raise ValueError for tensors whose memory kernels cannot read, or vectors that two weights would write into."""
    for name, tensors in ("weights", weights), ("gains", gains):
        for j, tensor in enumerate(tensors):
            if is_plain(tensor) and not has_plain_memory(tensor):
                raise ValueError(f"the memory of {name}[{j}] was freed or made smaller; bring it back first")
    taken: set[int] = set()
    for j, group in enumerate(groups):
        for vector in group:
            if vector.is_neg() or (is_plain(vector) and not has_plain_memory(vector)):
                raise ValueError(f"vectors[{j}] must be tensors with memory of their own; give clones")
            if not n_power_iterations or not is_plain(vector):
                continue
            if vector.data_ptr() in taken:
                raise ValueError(f"vectors[{j}] has a vector that is given twice; each is changed, so give clones")
            taken.add(vector.data_ptr())
