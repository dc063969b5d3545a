"""Normalises weights of one geometry again and again, with autograd's view of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import is_
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bssn_fast import ops, reference
from bssn_fast.backends.addresses import addresses
from bssn_fast.calls.composite import in_mode
from bssn_fast.calls.gradients import all_plain, have_memory, like, with_strides, without_sparse
from bssn_fast.calls.guard import Guard
from bssn_fast.calls.hooks import past_hooks
from bssn_fast.calls.memory import Pool
from bssn_fast.laws import AT_MOST, GAIN, Law, Laws
from bssn_fast.layout import (
    ONE,
    Batch,
    Stack,
    compute_dtype,
    has_dense_parts,
    has_its_memory,
    has_plain_memory,
    is_plain,
    made_dense,
)

_AS_SOON_AS_POSSIBLE = 2**63 - 1


class Values(NamedTuple):
    """What one call computed: normalised weights without a graph, a copy of the vectors used, sigma [matrices]."""

    normalized: list[Tensor]
    snapshot: Tensor
    sigma: Tensor

    def aliases(self) -> Values:
        """Return the same values in tensors of their own."""
        return Values([w.detach() for w in self.normalized], self.snapshot, self.sigma)


class Normalizer:
    """Normalises weights of one geometry, device and dtype again and again.

    `vectors` are flat: each layer's u_out, v_out and, where two_sided, u_in, v_in; contiguous, in the compute dtype.
    Weights may hold several matrices, as `stacks` has it: `laws` and sigma are then those of the matrices.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        dims: Sequence[int],
        two_sided: Sequence[bool],
        *,
        laws: Sequence[Law],
        eps: float,
        backend: str = "",
        gradient_groups: int = 1,
        stacks: Sequence[Stack] = (),
    ) -> None:
        self._stacks = stacks or [ONE] * len(weights)
        self.batch = Batch.of(list(map(made_dense, weights, self._stacks)), dims, two_sided, self._stacks)
        self._dtype = weights[0].dtype
        self.dense = all(map(has_dense_parts, weights, self._stacks))
        self.laws, self.eps, self.backend = Laws.of(laws), eps, backend
        # The weights that have a gain.
        self._gained = [j for j, first in enumerate(self.batch.first_rows[:-1]) if self.laws.kinds[first] == GAIN]
        self._checked = b""  # where weights and gains lay whose memory has been looked at
        self._right_weights = self._right_grads = Guard()  # like those of a backward pass that found nothing wrong
        self._outputs = Pool(self.batch.size, self.batch.parts)
        self._grads = Pool(self.batch.size, self.batch.parts)
        # Normalizers that lead to the weights of a range of layers each; this one computes all weights at once.
        self.parts: list[tuple[slice, Normalizer]] = []
        if gradient_groups > 1:
            for part in _ranges([w.numel() for w in weights], gradient_groups):
                layers = weights[part], dims[part], two_sided[part]
                its_laws, stacks = laws[self._rows(part)], self._stacks[part]
                normalizer = Normalizer(*layers, laws=its_laws, eps=eps, backend=backend, stacks=stacks)
                self.parts.append((part, normalizer))

    def compute(
        self,
        weights: Sequence[Tensor],
        vectors: Sequence[Tensor],
        n_power_iterations: int,
        dtype: torch.dtype,
        gains: Sequence[Tensor] = (),
        *,
        readable: bool = False,
    ) -> Values:
        """Run the operation, outside autograd; zero iterations leave the vectors alone.

        readable: kernels can read the weights, as a guard says; otherwise it is found out.
        """
        # What is kept of this call may be needed outside. A compiler keeps nothing, and torch 2.6's could not follow.
        if torch.is_inference_mode_enabled() and not in_mode():
            with torch.inference_mode(False):
                return self.compute(weights, vectors, n_power_iterations, dtype, gains, readable=readable)
        batch, device, working = self.batch, weights[0].device, compute_dtype(weights[0].dtype)
        sigma = torch.empty(len(self.laws.kinds), dtype=working, device=device)
        snapshot = torch.empty(batch.snapshot_size, dtype=working, device=device)
        normalized = self._outputs.take(dtype, device)
        ops.normalize(
            batch,
            weights
            if self.dense and (readable or not any(map(Tensor.is_neg, weights)))
            else list(map(made_dense, weights, self._stacks)),
            vectors,
            self._laws(gains, sigma),
            self.eps,
            n_power_iterations,
            normalized,
            snapshot,
            sigma,
            self.backend,
        )
        if n_power_iterations and not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(vectors)  # kernels write past torch's versions
        return Values(normalized, snapshot, sigma)

    def _laws(self, gains: Sequence[Tensor], like: Tensor) -> Laws:
        if not self.laws.gained:
            return self.laws
        numbers = [_number(gain, like) for gain in gains]
        if self.batch.stacks:
            numbers = [one for number in numbers for one in number.detach().split(1)]
        return self.laws.with_gains(numbers)

    def _rows(self, part: slice) -> slice:
        """Return the range of the matrices of a range of weights."""
        return slice(self.batch.first_rows[part.start], self.batch.first_rows[part.stop])

    @torch.no_grad()
    def scaled(
        self,
        weights: Sequence[Tensor],
        vectors: Sequence[Sequence[Tensor]],
        sigma: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> Values:
        """Return the values that known vectors and sigma [] of each weight give; each is one matrix."""
        values = Values(
            self._outputs.take(dtype, weights[0].device),
            sigma[0].new_zeros(self.batch.snapshot_size),
            torch.stack(list(sigma)),
        )
        for j, (w, kept) in enumerate(zip(weights, self.batch.snapshot_views(values.snapshot), strict=True)):
            for to, v in zip(kept, vectors[j], strict=True):
                to.copy_(v)
            factor = reference.multiplier(sigma[j], self.laws.numbers[j], self.laws.kinds[j] == AT_MOST)
            values.normalized[j].copy_(w.to(sigma[j].dtype) * factor)
        return values

    def attach(
        self,
        values: Values,
        weights: Sequence[Tensor],
        gains: Sequence[Tensor] = (),
        *,
        protect: bool = False,
        readable: bool = False,
    ) -> list[Tensor]:
        """Return the normalised weights with a graph that leads to weights and gains, if one is wanted.

        They then belong to that graph: attach copies made by `Values.aliases` to use the values again.

        protect: as views, into which torch refuses to write differentiably.
        """
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in (*weights, *gains)):
            return values.normalized
        if self.parts:
            return [w for k in range(len(self.parts)) for w in self._attach_part(k, values, weights, gains, protect)]
        if protect:
            values = values._replace(normalized=[w.view_as(w) for w in values.normalized])
        with past_hooks():
            if readable:  # half of the overhead of `apply`, which looks at each argument, in Python
                return list(_apply_directly(self, values, *weights, *gains))
            return list(_Attach.apply(self, values, *weights, *gains))

    def _attach_part(
        self, k: int, values: Values, weights: Sequence[Tensor], gains: Sequence[Tensor], protect: bool
    ) -> list[Tensor]:
        part, normalizer = self.parts[k]
        offsets = [*(starts[0] for starts in self.batch.snapshot_offsets), self.batch.snapshot_size]
        snapshot = values.snapshot[offsets[part.start] : offsets[part.stop]]
        own = Values(values.normalized[part], snapshot, values.sigma[self._rows(part)])
        its_gains = [g for j, g in zip(self._gained, gains, strict=True) if part.start <= j < part.stop]
        results = normalizer.attach(own, weights[part], its_gains, protect=protect)
        for graph in [w.grad_fn for w in results if w.grad_fn is not None][:1]:
            # Autograd runs what was recorded last first, and this was recorded before all layers' own operations.
            cast(Any, graph)._set_sequence_nr(_AS_SOON_AS_POSSIBLE)
        return results

    def gradients(
        self, values: Values, weights: Sequence[Tensor], gains: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Return dL/dW, and then dL/dgamma of the gains, where grads, dL/d(normalised weight), are given."""
        known = self._right_grads.holds(grads)
        grads = grads if known else without_sparse(grads)
        if not known and not have_memory(grads):
            return self.differentiable_gradients(values, weights, gains, grads)
        batch, sigma = self.batch, values.sigma
        weights = self._as_in_forward(weights, sigma)
        recorded = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0  # nothing is read then
        if not recorded:
            self._check_memory(weights, gains)
        given = cast("Sequence[Tensor]", grads) if known else self._readable(grads, weights, recorded)
        layers = list(range(len(grads))) if known else [j for j, g in enumerate(grads) if g is not None]
        if not layers:
            return [None] * (len(weights) + len(gains))
        if len(layers) == len(weights):
            # By now nobody holds the normalised weights, as a rule: the gradients come to lie where they were.
            pool = self._outputs if given[0].dtype == weights[0].dtype else self._grads
            results = pool.take(weights[0].dtype, weights[0].device)
        else:
            results = _in_one_buffer([weights[j] for j in layers])
        gained = [j for j in layers if j in self._gained] if gains else []
        sizes = [self._stacks[j].n for j in gained]
        grad_gains = sigma.new_empty(sum(sizes)) if gained else None
        ops.normalize_backward(
            batch,
            given,
            weights,
            layers,
            self._laws(gains, sigma),
            values.snapshot,
            values.sigma,
            results,
            grad_gains,
            self.backend,
        )
        found: list[Tensor | None] = [*results]
        if len(layers) < len(weights):
            found = [None] * len(weights)
            for j, result in zip(layers, results, strict=True):
                found[j] = result
        if gains:
            parts = {} if grad_gains is None else dict(zip(gained, grad_gains.split(sizes), strict=True))
            found += [like(parts.get(j), gain) for j, gain in zip(self._gained, gains, strict=True)]
        return found

    def needed(self, wanted: tuple[bool, ...]) -> tuple[bool, ...]:
        """Return which normalised weights lead to what needs a gradient, of the weights and then of the gains."""
        if not self._gained:
            return wanted
        needed = list(wanted[: len(self._stacks)])
        for j, of_gain in zip(self._gained, wanted[len(needed) :], strict=True):
            needed[j] = needed[j] or of_gain
        return tuple(needed)

    def _as_in_forward(self, weights: Sequence[Tensor], sigma: Tensor) -> Sequence[Tensor]:
        """Return the weights in tensors that kernels can read; raise RuntimeError if they are unlike the forward's."""
        if self.dense and self._right_weights.holds(weights):
            return weights
        dense, dtype = weights, weights[0].dtype
        if not self.dense or any(map(Tensor.is_neg, weights)):
            dense = list(map(made_dense, weights, self._stacks))
        if (
            not self.batch.fits(dense)
            or dtype != self._dtype
            or weights[0].device != sigma.device
            or any(w.dtype != dtype for w in weights)
        ):
            raise RuntimeError(
                "bssn_fast: between the forward and the backward pass a weight was given another shape, precision, "
                "device or memory format; run the forward pass after such changes"
            )
        if dense is weights:
            self._right_weights = Guard(weights)
        return dense

    def _readable(self, grads: Sequence[Tensor | None], weights: Sequence[Tensor], recorded: bool) -> Sequence[Tensor]:
        """Return the gradients that are given, in tensors that kernels can read.

        recorded: a compiler follows, to which they are no numbers.
        """
        given = [g for g in grads if g is not None]
        plain = recorded or all_plain(given)
        found = [
            g if g.stride() == strides and (plain or is_plain(g)) else with_strides(g, w)
            for g, w, strides in zip(grads, weights, self.batch.strides, strict=True)
            if g is not None
        ]
        if len(found) == len(grads) and all(map(is_, grads, found)):
            self._right_grads = Guard(found)
        return found

    def _check_memory(self, weights: Sequence[Tensor], gains: Sequence[Tensor]) -> None:
        """Raise RuntimeError for tensors whose memory is gone; quick where they lie where they lay the last time."""
        found = addresses(weights, gains)
        if found == self._checked:
            return
        for kind, tensors, is_there in ("weight", weights, has_plain_memory), ("gain", gains, has_its_memory):
            for x in tensors:
                if not is_there(x):
                    raise RuntimeError(
                        f"bssn_fast: between the forward and the backward pass the memory of a {kind} of shape "
                        f"{tuple(x.shape)} was freed or made smaller. Bring it back before the backward pass"
                    )
        self._checked = found

    def differentiable_gradients(
        self, values: Values, weights: Sequence[Tensor], gains: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The same in torch operations, for gradients of gradients: sigma = <S, W> is a function of W."""
        found: list[Tensor | None] = [None] * len(weights)
        grads = without_sparse(grads)
        its_gains = dict(zip(self._gained, gains, strict=True))
        of_gains: dict[int, Tensor] = {}
        vectors = self.batch.rows.snapshot_views(values.snapshot)
        for j, (weight, grad, stack) in enumerate(zip(weights, grads, self._stacks, strict=True)):
            if grad is None:
                continue
            rows, dim = self._rows(slice(j, j + 1)), self.batch.dims[j]
            laws = self.laws.part(range(rows.start, rows.stop))
            laws = laws.with_gains(its_gains[j].reshape(-1).split(1)) if j in its_gains else laws
            parts, gain_parts = [], []
            for w, g, own, law in zip(stack.parts(weight), stack.parts(grad), vectors[rows], laws.each(), strict=True):
                sigma = reference.spectral_norm(w.to(values.sigma.dtype), own, dim)
                parts.append(reference.normalize_backward(g, w, own, sigma, dim, *law))
                if j in its_gains:
                    gain_parts.append(reference.gain_backward(g, w, sigma))
            found[j] = stack.join(parts)
            if gain_parts:
                of_gains[j] = torch.cat(gain_parts)
        return found + [like(of_gains.get(j), gain) for j, gain in its_gains.items()]


def _ranges(sizes: Sequence[int], count: int) -> list[slice]:
    """Return at most `count` ranges that cover the sizes, each with about the same sum."""
    bounds = list(accumulate(sizes, initial=0))
    ideal = [bounds[-1] * k / count for k in range(count + 1)]
    cuts = {min(range(len(bounds)), key=lambda j: abs(bounds[j] - x)) for x in ideal}
    return [slice(a, b) for a, b in pairwise(sorted(cuts))]


def _in_one_buffer(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return a new tensor like each weight. They share a buffer: their distances are the same at every call."""
    batch = Batch.of(weights, [0] * len(weights), [False] * len(weights))
    return batch.parts(torch.empty(batch.size, dtype=weights[0].dtype, device=weights[0].device))


def _number(gain: Tensor, like: Tensor) -> Tensor:
    """Return a gain, or those of a weight's matrices, as the kernels read them."""
    if gain.dtype == like.dtype and gain.device == like.device and has_plain_memory(gain):
        return gain
    return gain.detach().to(like.device, like.dtype).resolve_neg()  # torch refuses to copy from freed memory


class _Attach(torch.autograd.Function):
    """Autograd's view of the operation, whose values have been computed before."""

    # With `setup_context` as a method of its own, every call would inspect the signature of `forward`: tens of
    # microseconds.
    @staticmethod
    def forward(ctx: Any, normalizer: Normalizer, values: Values, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.normalizer = normalizer
        ctx.values = Values([], values.snapshot, values.sigma)
        ctx.save_for_backward(*tensors)  # weights, then gains
        ctx.set_materialize_grads(False)
        needed = normalizer.needed(ctx.needs_input_grad[2:])
        if not all(needed):
            ctx.mark_non_differentiable(*[w for w, wanted in zip(values.normalized, needed, strict=True) if not wanted])
        return tuple(values.normalized)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        normalizer: Normalizer = ctx.normalizer
        needed = normalizer.needed(ctx.needs_input_grad[2:])
        wanted = grads if all(needed) else [g if n else None for g, n in zip(grads, needed, strict=True)]
        differentiate = normalizer.differentiable_gradients if torch.is_grad_enabled() else normalizer.gradients
        saved, n = _saved(ctx, together=len(grads) > 1), len(grads)
        return None, None, *differentiate(ctx.values, saved[:n], saved[n:], wanted)


def _saved(ctx: Any, together: bool) -> tuple[Tensor, ...]:
    try:
        return cast("tuple[Tensor, ...]", ctx.saved_tensors)
    except RuntimeError as error:
        if "second time" not in str(error) or not together:
            raise
        raise RuntimeError(
            "bssn_fast: the weights of a model's layers are normalised together, once in a call of the model and once "
            "in a `cached` block, and an earlier backward pass has freed what belongs to it: you try to go backward a "
            "second time. Run one backward pass over the sum of the losses, or use retain_graph=True. Where a model's "
            "own forward runs backward passes, as for losses of single layers, choose update='access'"
        ) from error


_apply_directly = super(torch.autograd.Function, _Attach).apply
"""`_Attach.apply` without its search for tensors that a transform of torch.func has wrapped and left behind."""
