"""Differentiable normalisation of many weights in one call, without modules."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bssn_fast import ops, reference
from bssn_fast.buffers import Pool
from bssn_fast.layout import Batch, compute_dtype, is_dense, same_strides, vector_sizes
from bssn_fast.plain import in_transform
from bssn_fast.sharded import refuse_sharded

WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_AS_SOON_AS_POSSIBLE = 2**63 - 1


class Values(NamedTuple):
    """What one call computed: normalised weights without a graph, a copy of the vectors used, sigma [n]."""

    normalized: list[Tensor]
    snapshot: Tensor
    sigma: Tensor

    def aliases(self) -> Values:
        """Return the same values in tensors of their own."""
        return Values([w.detach() for w in self.normalized], self.snapshot, self.sigma)


class Normalizer:
    """Normalises weights of one geometry, device and dtype again and again.

    `vectors` are flat: each layer's u_out, v_out and, where two_sided, u_in, v_in; contiguous, in the compute dtype.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        dims: Sequence[int],
        two_sided: Sequence[bool],
        *,
        scale: float,
        eps: float,
        backend: str = "",
        gradient_groups: int = 1,
    ) -> None:
        self.batch = Batch.of([w if is_dense(w) else w.contiguous() for w in weights], dims, two_sided)
        self.dense = all(is_dense(w) for w in weights)
        self.scale, self.eps, self.backend = scale, eps, backend
        self._outputs = Pool(self.batch.size, self.batch.views)
        self._grads = Pool(self.batch.size, self.batch.views)
        # Normalizers that lead to the weights of a range of layers each; this one computes all weights at once.
        self.parts: list[tuple[slice, Normalizer]] = []
        if gradient_groups > 1:
            for part in _ranges([w.numel() for w in weights], gradient_groups):
                layers = weights[part], dims[part], two_sided[part]
                self.parts.append((part, Normalizer(*layers, scale=scale, eps=eps, backend=backend)))

    def compute(
        self, weights: Sequence[Tensor], vectors: Sequence[Tensor], n_power_iterations: int, dtype: torch.dtype
    ) -> Values:
        """Run the operation, outside autograd; zero iterations leave the vectors alone."""
        if torch.is_inference_mode_enabled():  # what is kept of this call may be needed outside
            with torch.inference_mode(False):
                return self.compute(weights, vectors, n_power_iterations, dtype)
        batch, device, working = self.batch, weights[0].device, compute_dtype(weights[0].dtype)
        sigma = torch.empty(len(weights), dtype=working, device=device)
        snapshot = torch.empty(batch.snapshot_size, dtype=working, device=device)
        normalized = self._outputs.take(dtype, device)
        ops.normalize(
            batch,
            weights if self.dense else [w if is_dense(w) else w.detach().contiguous() for w in weights],
            vectors,
            self.scale,
            self.eps,
            n_power_iterations,
            normalized,
            snapshot,
            sigma,
            self.backend,
        )
        return Values(normalized, snapshot, sigma)

    def attach(self, values: Values, weights: Sequence[Tensor], *, protect: bool = False) -> list[Tensor]:
        """Return the normalised weights with a graph that leads to the weights, if one is wanted.

        They then belong to that graph: attach copies made by `Values.aliases` to use the values again.

        protect: as views, into which torch refuses to write differentiably.
        """
        if not torch.is_grad_enabled() or not any(w.requires_grad for w in weights):
            return values.normalized
        if self.parts:
            return [w for k in range(len(self.parts)) for w in self._attach_part(k, values, weights, protect)]
        if protect:
            values = values._replace(normalized=[w.view_as(w) for w in values.normalized])
        with _past_saved_tensor_hooks():
            return _attached(self, values, weights)

    def _attach_part(self, k: int, values: Values, weights: Sequence[Tensor], protect: bool) -> list[Tensor]:
        part, normalizer = self.parts[k]
        offsets = [*(starts[0] for starts in self.batch.snapshot_offsets), self.batch.snapshot_size]
        snapshot = values.snapshot[offsets[part.start] : offsets[part.stop]]
        own = Values(values.normalized[part], snapshot, values.sigma[part])
        results = normalizer.attach(own, weights[part], protect=protect)
        for graph in [w.grad_fn for w in results if w.grad_fn is not None][:1]:
            # Autograd runs what was recorded last first, and this was recorded before all layers' own operations.
            cast(Any, graph)._set_sequence_nr(_AS_SOON_AS_POSSIBLE)
        return results

    def gradients(
        self, values: Values, weights: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Return dL/dW where grads, dL/d(normalised weight), are given."""
        batch = self.batch
        if not self.dense:
            weights = [w if is_dense(w) else w.contiguous() for w in weights]
        sigma, dtype = values.sigma, weights[0].dtype
        if (
            not batch.fits(weights)
            or compute_dtype(dtype) != sigma.dtype
            or weights[0].device != sigma.device
            or any(w.dtype != dtype for w in weights)
        ):
            raise RuntimeError(
                "bssn_fast: between the forward and the backward pass a weight was given another shape, precision, "
                "device or memory format; run the forward pass after such changes"
            )
        given = [
            g if g.stride() == strides else _with_strides(g, w)
            for g, w, strides in zip(grads, weights, batch.strides, strict=True)
            if g is not None
        ]
        layers = [j for j, g in enumerate(grads) if g is not None]
        if not layers:
            return [None] * len(weights)
        if len(layers) == len(weights):
            # By now nobody holds the normalised weights, as a rule: the gradients come to lie where they were.
            pool = self._outputs if given[0].dtype == weights[0].dtype else self._grads
            results = pool.take(weights[0].dtype, weights[0].device)
        else:
            results = _in_one_buffer([weights[j] for j in layers])
        ops.normalize_backward(
            batch,
            given,
            weights,
            layers,
            self.scale,
            values.snapshot,
            values.sigma,
            results,
            self.backend,
        )
        found: list[Tensor | None] = [None] * len(weights)
        for j, result in zip(layers, results, strict=True):
            found[j] = result
        return found

    def differentiable_gradients(
        self, values: Values, weights: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The same in torch operations, for gradients of gradients: sigma = <S, W> is a function of W."""
        found: list[Tensor | None] = []
        for w, g, vectors, dim in zip(
            weights, grads, self.batch.snapshot_views(values.snapshot), self.batch.dims, strict=True
        ):
            if g is None:
                found.append(None)
                continue
            sigma = reference.spectral_norm(w.to(values.sigma.dtype), vectors, dim)
            found.append(reference.normalize_backward(g, w, vectors, sigma, dim, self.scale))
        return found


def _ranges(sizes: Sequence[int], count: int) -> list[slice]:
    """Return at most `count` ranges that cover the sizes, each with about the same sum."""
    bounds = list(accumulate(sizes, initial=0))
    ideal = [bounds[-1] * k / count for k in range(count + 1)]
    cuts = {min(range(len(bounds)), key=lambda j: abs(bounds[j] - x)) for x in ideal}
    return [slice(a, b) for a, b in pairwise(sorted(cuts))]


def _in_one_buffer(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return a new tensor like each weight. They share a buffer: their distances are the same at every call."""
    batch = Batch.of(weights, [0] * len(weights), [False] * len(weights))
    return batch.views(torch.empty(batch.size, dtype=weights[0].dtype, device=weights[0].device))


def _with_strides(grad: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient laid out in memory as its weight is."""
    if same_strides(grad, weight):
        return grad
    return torch.empty_strided(weight.shape, weight.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)


def _past_saved_tensor_hooks() -> contextlib.AbstractContextManager[None]:
    """Keep hooks for saved tensors away from the weights.

    They are parameters: there is nothing to offload. And torch.utils.checkpoint counts what is saved in the forward and
    again in the recomputation, where a model call's normalisation is not repeated.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


class _Attach(torch.autograd.Function):
    """Autograd's view of the operation, whose values have been computed before."""

    # With `setup_context` as a method of its own, every call would inspect the signature of `forward`: tens of
    # microseconds.
    @staticmethod
    def forward(ctx: Any, normalizer: Normalizer, values: Values, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.normalizer = normalizer
        ctx.values = Values([], values.snapshot, values.sigma)
        ctx.save_for_backward(*weights)
        ctx.set_materialize_grads(False)
        needed = ctx.needs_input_grad[2:]
        if not all(needed):
            ctx.mark_non_differentiable(*[w for w, wanted in zip(values.normalized, needed, strict=True) if not wanted])
        return tuple(values.normalized)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[2:], strict=True)]
        differentiate = ctx.normalizer.gradients
        if torch.is_grad_enabled():
            differentiate = ctx.normalizer.differentiable_gradients
        return None, None, *differentiate(ctx.values, ctx.saved_tensors, wanted)


def _attached(normalizer: Normalizer, values: Values, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return what `_Attach.apply` does, with half of its overhead where no transform of torch.func has been.

    It goes through its arguments, in Python, for tensors that a transform has wrapped and left behind.
    """
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if in_transform() or any(map(wrapped, weights)):
        return list(_Attach.apply(normalizer, values, *weights))
    return list(super(torch.autograd.Function, _Attach).apply(normalizer, values, *weights))


def check_weight(weight: Tensor, dim: int, name: str) -> None:
    """Raise ValueError or TypeError, naming the layer and the remedy, for a weight that cannot be normalised."""
    if isinstance(weight, torch.nn.UninitializedParameter):
        raise ValueError(f"{name}: the weight is not initialised yet; run one forward of the lazy module first")
    if weight.is_meta:
        raise ValueError(
            f"{name}: the weight is on the meta device; materialise the model first (`to_empty`, then load)"
        )
    refuse_sharded(weight, name)
    if weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(
            f"{name}: weights of {weight.dtype} cannot be normalised; "
            "convert the layer to float32, float64, bfloat16 or float16, or leave it out"
        )
    if weight.layout != torch.strided:
        raise TypeError(f"{name}: the weight is {weight.layout}; convert it with `to_dense()` or leave the layer out")
    if weight.ndim < 2:
        raise ValueError(f"{name}: a weight of {weight.ndim} dimension(s) has no spectral norm; leave the layer out")
    if weight.numel() == 0:
        raise ValueError(f"{name}: the weight of shape {tuple(weight.shape)} is empty; leave the layer out")
    if dim not in (0, 1):
        raise ValueError(f"{name}: the output dimension must be 0 or 1, not {dim}")


def check_settings(scale: float, eps: float, n_power_iterations: int, *, fewest: int = 0) -> None:
    """Raise ValueError for settings out of range."""
    if not (0 < scale < float("inf")):
        raise ValueError(f"scale must be a positive finite number, not {scale}")
    if not (0 < eps < float("inf")):
        raise ValueError(f"eps must be a positive finite number, not {eps}; the default is 1e-12")
    if isinstance(n_power_iterations, bool) or not isinstance(n_power_iterations, int) or n_power_iterations < fewest:
        raise ValueError(f"n_power_iterations must be a whole number of at least {fewest}, not {n_power_iterations!r}")


def normalize(
    weights: Sequence[Tensor],
    vectors: Sequence[Sequence[Tensor]],
    *,
    dims: int | Sequence[int] = 0,
    scale: float = 1.0,
    eps: float = 1e-12,
    n_power_iterations: int = 1,
    dtype: torch.dtype | None = None,
    backend: str = "",
) -> tuple[list[Tensor], Tensor]:
    """Divide weights by their spectral norms, all in one call, and multiply by `scale`.

    Args:
        weights: n >= 1 tensors of one device and one dtype (float32, float64, bfloat16, float16) of shape
            [c_out, c_in, *kernel], or [c_in, c_out, *kernel] where the layer's dim is 1.
        vectors: for each weight (u_out [c_out], v_out [c_in k]) for one direction, or (u_out, v_out, u_in [c_in],
            v_in [c_out k]) for the mean of both; contiguous, float64 for float64 weights, else float32. Updated in
            place, if `n_power_iterations` is not 0.
        dims: the output dimension, 0 or 1, of all weights or of each.
        scale: the constant c.
        eps: smallest length that a vector is divided by.
        n_power_iterations: power iterations before sigma is taken; 0 evaluates with the vectors as they are.
        dtype: of the results; the weights' by default.
        backend: "reference", "cpu", "triton" or "cuda"; empty for the default of the device.

    Returns:
        The normalised weights, differentiable any number of times with u and v held constant, and sigma [n].

    A zero weight gives zeros and sigma 0; one with infinities or NaN gives NaN. Neither changes its vectors.

    Raises ValueError or TypeError for arguments that do not fit, before any vector has changed.
    """
    weights, groups = list(weights), [tuple(v) for v in vectors]
    dims = [dims] * len(weights) if isinstance(dims, int) else list(dims)
    check_settings(scale, eps, n_power_iterations)
    if not weights:
        raise ValueError("there are no weights to normalise")
    if not len(weights) == len(groups) == len(dims):
        raise ValueError(f"{len(weights)} weights, {len(groups)} tuples of vectors and {len(dims)} dims do not match")
    for j, (weight, group, dim) in enumerate(zip(weights, groups, dims, strict=True)):
        check_weight(weight, dim, f"weights[{j}]")
        _check_vectors(weights[0], weight, group, dim, j)
    dtype = dtype or weights[0].dtype
    if dtype not in WEIGHT_DTYPES:
        raise TypeError(f"results of {dtype} are not supported; choose float32, float64, bfloat16 or float16")
    two_sided, flat = [len(group) == 4 for group in groups], [v for group in groups for v in group]
    if torch.compiler.is_dynamo_compiling():
        from bssn_fast import compiled  # with it comes torch's compiler, which takes long to import

        results = compiled.normalize(
            weights, flat, dims, two_sided, float(scale), float(eps), n_power_iterations, dtype, backend, 1
        )
        return list(results[:-1]), results[-1]
    normalizer = Normalizer(weights, dims, two_sided, scale=float(scale), eps=float(eps), backend=backend)
    values = normalizer.compute(weights, flat, n_power_iterations, dtype)
    return normalizer.attach(values, weights), values.sigma.clone()


def _check_vectors(first: Tensor, weight: Tensor, group: tuple[Tensor, ...], dim: int, j: int) -> None:
    if weight.dtype != first.dtype or weight.device != first.device:
        raise TypeError(
            f"weights[{j}] is {weight.dtype} on {weight.device}, weights[0] {first.dtype} on {first.device}; "
            "normalise each kind in a call of its own"
        )
    if len(group) not in (2, 4):
        raise ValueError(f"vectors[{j}] has {len(group)} vectors; give (u_out, v_out) or (u_out, v_out, u_in, v_in)")
    sizes = vector_sizes(weight.shape, dim, len(group) == 4)
    for vector, size in zip(group, sizes, strict=True):
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
