"""Spectral norms of a model's weights, without changing anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bssn_fast.calls.arguments import check_settings, check_weight
from bssn_fast.calls.estimation import start_vectors
from bssn_fast.calls.matrices import Matrices
from bssn_fast.distributed.sharded import refuse_sharded
from bssn_fast.laws import Law
from bssn_fast.layout import (
    ONE,
    Stack,
    channels,
    compute_dtype,
    fits_kernels,
    input_dimension,
    made_dense,
    needs_two_sides,
)
from bssn_fast.modules import convert
from bssn_fast.modules.convert import Norm
from bssn_fast.modules.places import Place, choose, refuse_following, weight_of

_FIRST_ROUND, _MOST_IN_A_ROUND = 8, 2048
_STANDING_STILL = 1e-4


class SpectralNorms(NamedTuple):
    """Of the weight that a layer computes with, as scalar tensors; [n] of a layer with n blocks.

    s_out, s_in: of the weight unfolded as c_out x (c_in k) and as c_in x (c_out k); the same where k = 1.
    bound: on the operator norm of the layer, sqrt(k) min(s_out, s_in), which is s_out where k = 1. It holds for
        convolutions of any stride and dilation (Singla and Feizi, "Fantastic Four", ICLR 2021, theorem 1; with groups
        too, whose operators are parts of those of the matrices), padded with zeros or circularly; infinite for others.
        Of a layer with blocks it is each block's own. All of it has at most the largest of them where blocks are a
        convolution's groups, which see different inputs, and sqrt(n) times the largest where they see the same.
    """

    s_out: Tensor
    s_in: Tensor
    bound: Tensor


class _Measured(NamedTuple):
    place: Place
    norm: Norm
    weight: Tensor
    dim: int
    stack: Stack
    vectors: list[Tensor]  # u_out, v_out and, where they are needed, u_in, v_in

    def matrices(self) -> list[tuple[Tensor, list[Tensor]]]:
        """Return what the weight holds, each with its vectors."""
        weight = made_dense(self.weight, self.stack)
        return [(w, list(own)) for w, own in self.stack.each(weight, self.vectors)]


@torch.no_grad()
def spectral_norms(
    model: nn.Module,
    *,
    vectors: dict[str, list[Tensor]] | None = None,
    n_power_iterations: int = 1,
    names: Iterable[str] | None = None,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    eps: float = 1e-12,
    backend: str = "",
) -> dict[str, SpectralNorms]:
    """Return the spectral norms of a model's weights, normalised or not, by layers' names.

    All are measured together, in one call for each dtype and device that only reads the weights, in each direction
    once. Neither the model nor its vectors change. A normalised layer's are those of the normalised weight, as in
    evaluation.

    Power iterations come from below: without vectors they are repeated until no norm grows by 0.01 % from one round to
    the next, twice as long one, for which a GPU is waited for. With those of an earlier call, `n_power_iterations`
    follow the weights as they are trained, and nothing is waited for.

    Args:
        model: any module.
        vectors: a dict that the caller keeps, empty at first: filled here, and used and changed by later calls.
        n_power_iterations: for weights whose vectors are there.
        names: the layers, as in `bssn_fast.apply`.
        filter_fn: the layers, as in `bssn_fast.apply`.
        eps: smallest length that a vector is divided by.
        backend: as in `bssn_fast.apply`.

    Raises ValueError or TypeError for layers that cannot be measured, which are named.

    Examples:
        >>> warm = {}
        >>> norms = bssn_fast.spectral_norms(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), vectors=warm)
        >>> norms["0"].bound >= norms["0"].s_out
        tensor(True)
    """
    eps, n = check_settings(eps, n_power_iterations)
    kept: dict[str, list[Tensor]] = {} if vectors is None else vectors
    measured = [_measured(place, kept) for place in choose(model, names, filter_fn)]
    found: dict[str, SpectralNorms] = {}
    for part in _parts(measured):
        rows = [(m, *row, side) for m in part for side in range(0, len(m.vectors), 2) for row in m.matrices()]
        matrices = Matrices(
            [weight for _, weight, _, _ in rows],
            [m.dim if side == 0 else input_dimension(m.dim) for m, _, _, side in rows],
            [own[side : side + 2] for _, _, own, side in rows],
            [Law()] * len(rows),
            eps=eps,
            backend=backend,
        )
        if all(m.place.name in kept for m in part):
            matrices.run(n, change=False)
        else:
            _converge(matrices)
        factors = _multipliers(part, backend)
        sigma = iter(matrices.sigma.clone())
        for m, factor in zip(part, factors, strict=True):
            s_out, s_in = [
                m.stack.join_numbers([next(sigma) for _ in range(m.stack.n)]) * factor
                for _ in range(0, len(m.vectors), 2)
            ] * (1 if len(m.vectors) == 4 else 2)
            found[m.place.name] = SpectralNorms(s_out, s_in, _bound(m, s_out, s_in))
        kept.update({m.place.name: m.vectors for m in part})
    return {m.place.name: found[m.place.name] for m in measured}


def _measured(place: Place, kept: dict[str, list[Tensor]]) -> _Measured:
    norm = convert.find(place.module, place.shown(), place.tensor_name)
    refuse_following(place)
    weight, dim = weight_of(place, norm)
    refuse_sharded(weight, place.shown())
    check_weight(weight, dim, place.shown())
    if not fits_kernels(weight, dim):
        raise ValueError(
            f"{place.shown()}: {weight.dtype} of shape {tuple(weight.shape)} with output dimension {dim}; only real "
            "weights of two dimensions or more, with output dimension 0 or 1, are measured. Leave the layer out"
        )
    weight = weight.detach()
    ours = convert.own(norm)
    stack = ONE if ours is None else ours.settings.stack
    two_sided = needs_two_sides(stack.shape(weight.shape), dim)
    shapes = stack.vector_shapes(weight.shape, dim, two_sided)
    known, dtype = kept.get(place.name, []), compute_dtype(weight.dtype)
    if [tuple(v.shape) for v in known] != shapes:
        kept.pop(place.name, None)
        parts = stack.parts(weight)
        known = stack.join_vectors([start_vectors(part, dim, two_sided, [None] * len(shapes)) for part in parts])
    vectors = [v.to(weight.device, dtype).contiguous() for v in known]
    return _Measured(place, norm, weight, dim, stack, vectors)


def _parts(measured: list[_Measured]) -> list[list[_Measured]]:
    parts: dict[Any, list[_Measured]] = {}
    for m in measured:
        parts.setdefault((m.weight.device, m.weight.dtype), []).append(m)
    return list(parts.values())


def _converge(matrices: Matrices) -> None:
    before, n = [0.0] * len(matrices.weights), _FIRST_ROUND
    while n <= _MOST_IN_A_ROUND:
        matrices.run(n, change=False)
        now = matrices.sigma.tolist()
        if not any(s > old * (1 + _STANDING_STILL) for s, old in zip(now, before, strict=True)):
            return
        before, n = now, 2 * n


def _multipliers(part: list[_Measured], backend: str) -> list[Tensor | float]:
    """Return what each weight is multiplied by where it is used: 1, or what its norm makes of it in evaluation."""
    factors: list[Tensor | float] = [1.0] * len(part)
    found = [convert.own(m.norm) for m in part]
    ours = [j for j, norm in enumerate(found) if norm is not None]
    if ours:
        norms = [norm for norm in found if norm is not None]
        used = [part[j]._replace(vectors=norm.vectors(part[j].weight)) for j, norm in zip(ours, norms, strict=True)]
        rows = [(m.dim, *row) for m in used for row in m.matrices()]
        dims, weights, vectors = zip(*rows, strict=True)
        own = Matrices(weights, dims, vectors, [Law()] * len(rows), eps=1e-12, backend=backend)
        own.run(0, change=False)
        sigma = iter(own.sigma)
        for j, norm, m in zip(ours, norms, used, strict=True):
            its_sigma = m.stack.join_numbers([next(sigma) for _ in range(m.stack.n)])
            factors[j] = norm.multiplier_of(its_sigma).abs()  # a gain may be negative
    for j, m in enumerate(part):
        if isinstance(m.norm, convert.TorchSpectralNorm):
            factors[j] = m.norm.multiplier().abs()
    return factors


def _bound(m: _Measured, s_out: Tensor, s_in: Tensor) -> Tensor:
    k = channels(m.stack.shape(m.weight.shape), m.dim)[2]
    if getattr(m.place.module, "padding_mode", "zeros") not in ("zeros", "circular"):
        return torch.full_like(s_out, math.inf)
    return math.sqrt(k) * torch.minimum(s_out, s_in)
