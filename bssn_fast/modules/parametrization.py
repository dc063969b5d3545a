"""One layer's spectral normalisation: its vectors, and what torch's parametrize calls when the weight is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from bssn_fast import reference
from bssn_fast.calls import composite
from bssn_fast.calls.contents import version
from bssn_fast.calls.estimation import estimate_vectors, random_direction, write
from bssn_fast.calls.member import Measured
from bssn_fast.calls.normalizer import Normalizer
from bssn_fast.calls.plan import Plan, Results, Seen, checked_vectors
from bssn_fast.calls.selective import uncounted
from bssn_fast.calls.sharded import ShardedPlan, plan_for
from bssn_fast.distributed.sharded import is_sharded, placements_of, whole_of
from bssn_fast.laws import AT_MOST, GAIN, first_gain
from bssn_fast.layout import compute_dtype, fits_kernels, needs_two_sides
from bssn_fast.modules import recomputation, sharing, writes
from bssn_fast.modules.advice import Advice
from bssn_fast.modules.call import Call, Caller, Source, in_module_call
from bssn_fast.modules.settings import VARIANTS, Settings
from bssn_fast.tracing.recording import Traced, called_eagerly, is_exporting, recorded_result

FIRST_ITERATIONS = 15
"""Power iterations on random first vectors: as many as torch's parametrization does."""


class _Beginning(NamedTuple):
    """A weight and vectors as they were when the vectors were computed for it, until the layer is first used."""

    weight: Tensor
    version: int
    vectors: list[Tensor]


class SpectralNormalization(nn.Module):
    """Parametrization that gives g(sigma(W)) W, sigma being a spectral norm or the mean of the two unfoldings'.

    g is the law: c / sigma, min(1, c / sigma), or gamma / sigma with the Parameter `gain` [1], gamma.

    Buffers, in float32 (float64 for float64 weights, complex for complex ones), also after `.half()`: `_u` [c_out] and
    `_v` [c_in k], the names of torch.nn.utils.parametrizations.spectral_norm; for two directions also `_u_in` [c_in]
    and `_v_in` [c_out k]. A weight of one dimension has none. A weight that holds n matrices has n of each, `_u`
    [n, c_out] for instance, and `gain` [n].
    """

    _u: Tensor
    _v: Tensor
    gain: nn.Parameter | None
    origin: SpectralNormalization | None = None  # what this one stands in for on a device of DataParallel
    held = False  # that one has had the iteration of this call
    preceded = False  # by other parametrizations: the weight is another tensor at each read, and no model's call has it

    def __init__(
        self,
        weight: Tensor,
        settings: Settings,
        *,
        name: str,
        dim: int,
        autocast: bool,
        known: Sequence[Tensor] = (),
        in_use: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_parameter("gain", None)
        self.name = name  # of the layer, for messages
        self.dim, self.autocast = dim, autocast
        self.layers = 1  # that share the weight
        # The groups in whose calls of a model the layer is normalised, and its index in each.
        self.slots: tuple[tuple[Caller, int], ...] = ()
        self.used = False  # a model or layer has computed with the weight
        self.measured, self.traced = Measured(), Traced()
        self.advice = Advice()  # where no group has it
        self.vector_names: tuple[str, ...] = ()
        self.seen: Seen | None = None  # at the last evaluation
        self._beginning: _Beginning | None = None
        self._plan: Plan | ShardedPlan | None = None
        self.configure(weight, settings, known, in_use)

    def __getstate__(self) -> dict[str, Any]:  # a copy begins with nothing at hand
        return {**self.__dict__, **_nothing_at_hand()}

    @property
    def groups(self) -> tuple[Caller, ...]:
        """The groups in whose calls of a model the layer is normalised."""
        return tuple([group for group, _ in self.slots])

    def configure(
        self, weight: Tensor, settings: Settings, known: Sequence[Tensor] = (), in_use: Tensor | None = None
    ) -> None:
        """Change the settings, and compute the vectors, and the gain, that are not there yet.

        known: the first vectors, in the order of `vector_names`, if they do not come from the buffers.
        in_use: what the weight has been multiplied by so far, if not by these settings' predecessors.
        """
        stack, new_gain = settings.stack, settings.kind == GAIN and self.gain is None
        if new_gain and "settings" in vars(self):
            self.as_in_evaluation(weight)
            in_use = self.multiplier_of(self.sigma_of(weight))
        two_sided = VARIANTS[settings.variant][0] and needs_two_sides(stack.shape(weight.shape), self.dim)
        known = known or self._stored()
        shapes = stack.vector_shapes(weight.shape, self.dim, two_sided)
        names = ("_u", "_v", "_u_in", "_v_in")[: len(shapes)]
        kept = [vector.detach().clone() for vector in known[: len(names)]]
        new = [*(k.clone() for k in kept), *(random_direction(weight, shape) for shape in shapes[len(kept) :])]
        for name in self.vector_names:
            del self._buffers[name]
        if settings.kind != GAIN:
            self.gain = None
        elif new_gain:
            one = torch.ones(stack.n, dtype=compute_dtype(weight.dtype).to_real(), device=weight.device)
            self.gain = nn.Parameter(one, requires_grad=weight.requires_grad)
        self.settings, self.two_sided, self.vector_names = settings, two_sided, names
        self.placements = placements_of(weight)
        for name, vector in zip(names, new, strict=True):
            self.register_buffer(name, vector)
        block = sharing.block_of(self)
        if block is not None:  # it may have a result of the settings before
            block.forget(self)
        if composite.wants_plain_operations([weight]) and not is_sharded(weight):
            return  # nothing can be computed yet
        if len(kept) < len(names):
            self._compute(weight, FIRST_ITERATIONS)
            write(self._stored()[: len(kept)], kept)
        self.evaluate(weight)
        if new_gain:
            with torch.no_grad():
                cast(Tensor, self.gain).copy_(first_gain(self.sigma_of(weight), in_use))

    def multiplier_of(self, sigma: Tensor) -> Tensor:
        """Return g(sigma). Where the gain is sharded, all ranks must ask."""
        scale, gain = self.settings.scale, self.gain
        number = sigma.new_tensor(scale) if isinstance(scale, tuple) else scale
        if gain is not None:
            number = whole_of(gain.detach()).to(sigma.device, sigma.dtype)
        return reference.multiplier(sigma, number, self.settings.kind == AT_MOST)

    def begin_with(self, weight: Tensor) -> None:
        """Remember what the vectors were computed for, until the layer is first used."""
        self._beginning = _Beginning(weight, version(weight), [v.detach().clone() for v in self._stored()])

    def chosen_by_hand(self, weight: Tensor) -> bool | None:
        """Whether a user seems to have chosen the vectors for this weight; the first use asks, and nothing after.

        They have changed since they were computed, and the weight has not. Who writes into both may have loaded or
        broadcast a model, whose vectors need not be good ones. None if this is not the layer's own weight.
        """
        beginning = self._beginning
        if beginning is None or (beginning.weight is not weight and self.origin is None):
            return None
        self._beginning = None
        if self.origin is not None:
            self.origin._beginning = None
        found = self._stored()
        changed = len(found) != len(beginning.vectors) or any(
            not torch.equal(v, old.to(v)) for v, old in zip(found, beginning.vectors, strict=True)
        )
        return changed and version(beginning.weight) == beginning.version

    def _compute(self, weight: Tensor, n_power_iterations: int) -> Tensor:
        if is_sharded(weight):
            return ShardedPlan([self], [weight]).compute_alone(weight, n_power_iterations)
        if not fits_kernels(weight, self.dim):
            return composite.normalize(self, weight.detach(), n_power_iterations)[0]
        s, gains = self.settings, [] if self.gain is None else [self.gain]
        sides = [self.dim], [self.two_sided]
        normalizer = Normalizer([weight], *sides, laws=s.laws(), eps=s.eps, backend=s.backend, stacks=[s.stack])
        values = normalizer.compute([weight.detach()], self.vectors(weight), n_power_iterations, weight.dtype, gains)
        self.measured.sigma, self.measured.index = values.sigma, Measured.at(0, s.stack)
        return values.normalized[0]

    def evaluate(self, weight: Tensor) -> Tensor:
        """Return the normalised weight, without a graph, that the vectors as they are give."""
        if composite.wants_plain_operations([weight]) and not is_sharded(weight):
            return composite.normalize(self, weight.detach(), 0)[0]
        return self._compute(weight, 0)

    def as_in_evaluation(self, weight: Tensor) -> Tensor:
        """Return the same after a look whether the vectors belong to the weight, as calls in evaluation have it."""
        for name in self.vector_names:  # replaced and not written to, so that `changes` can put them back
            self._buffers[name] = cast(Tensor, self._buffers[name]).clone()
        device = weight.device.type
        casts = not weight.is_meta and torch.is_autocast_enabled(device)  # what autocast asks for is a rounded copy
        with torch.no_grad(), torch.autocast(device, enabled=False) if casts else contextlib.nullcontext():
            (normalized,) = plan_for([self], [weight]).normalize([weight], iterate=False, keep=False).normalized
        return normalized

    def sigma_of(self, weight: Tensor) -> Tensor:
        """Return sigma of the last normalisation; where that was part of compiled code, compute it."""
        if self.measured.sigma is None:
            self.evaluate(weight)
        found = self.measured.own()
        if found is None:
            raise RuntimeError(f"bssn_fast: the weight of {self.name} has no values yet; materialise the model first")
        return found

    def _stored(self) -> list[Tensor]:
        return [cast(Tensor, self._buffers[name]) for name in self.vector_names]

    def vectors(self, weight: Tensor) -> list[Tensor]:
        """Return the buffers u_out, v_out[, u_in, v_in], made to fit the weight's dtype and device."""
        found = self._stored()
        checked = checked_vectors(self, found, weight)
        if any(new is not old for new, old in zip(checked, found, strict=True)):  # a compiler cannot ask the lists
            for name, vector in zip(self.vector_names, checked, strict=True):
                self._buffers[name] = vector
        return checked

    def find(self, weight: Tensor) -> Tensor | None:
        """Return what a running call of a model has normalised the weight to."""
        for group, j in self.slots:
            call = group.calls.get(get_ident())
            if call is not None and call.aside and not call.running():  # an interrupt has ended it, in another call
                call.bring_back(get_ident())
                call = group.calls.get(get_ident())
            if call is not None:
                ready = call.find(j, weight, self)
                if ready is not None:
                    return ready
        return None

    def looked_at(self) -> None:
        """Let a running call of a model know that somebody has got at the weight, and may write into it."""
        for call, j in self._running():
            call.doubt(j)

    def iterated_in_call(self, weight: Tensor) -> bool:
        """Whether a running call of a model has had an iteration for this weight."""
        return self.held or any(call.iterated(j, weight) for call, j in self._running())

    def _running(self) -> list[tuple[Call, int]]:
        """Return the running calls of a model that contains the layer, with its index in each."""
        found = [(group.calls.get(get_ident()), j) for group, j in self.slots]
        return [(call, j) for call, j in found if call is not None and call.running()]

    @called_eagerly
    def forward(self, weight: Tensor) -> Tensor:
        """Return the normalised weight: the one of the current model call, or one made for this access alone."""
        return self.normalized(weight, None)

    @called_eagerly
    def normalized(self, weight: Tensor, layer: object) -> Tensor:
        """Return the same for a reader of the layer, torch's list of parametrizations, that holds this one alone."""
        if is_dynamo_compiling() or is_exporting():
            from bssn_fast.tracing import hooks  # with it comes torch's compiler, which takes long to import

            return hooks.normalize_alone(self, weight)
        writes.settle((id(self),))
        ready = self.find(weight)
        if ready is None:
            ready = recorded_result(self, weight)
        if ready is not None:
            return ready
        block = sharing.block_of(self) if sharing.any_block() else None
        backward = recomputation.in_backward()
        if block is not None and (entry := block.find(self, weight)) is not None:
            if entry.source is not None and self.training and recomputation.maybe_in_checkpoint():
                recomputation.note(self, entry.source.vectors, in_call=False)
            return entry.result
        inside = in_module_call()
        with uncounted():
            results = self._normalize_alone(weight, block, backward, inside)
        (normalized,) = results.normalized
        if block is not None and not backward:
            block.note_iteration(self)
            if not composite.is_temporary() and not self.preceded:
                block.keep(self, weight, normalized, Source(results, 0))
        elif not backward:
            if inside:
                self.used = True
            elif layer is not None:
                writes.watch(self, layer, weight, normalized)
        return normalized

    def _normalize_alone(self, weight: Tensor, block: sharing.Block | None, backward: bool, inside: bool) -> Results:
        """Normalise this layer by itself, and let checkpoints know its vectors."""
        iterate = self.training and not backward and not self.iterated_in_call(weight)
        if block is not None:
            iterate = iterate and not block.iterated(self, weight)
        known = recomputation.recall(self, in_call=False) if backward and self.training else None
        unknown = backward and known is None and self.training and torch.is_grad_enabled()
        for group, j in self.slots:
            call = group.calls.get(get_ident())
            if call is not None and call.stands_in(j, weight):
                group.advice.stand_in(self.name)
            if iterate and inside:
                group.advice.alone(len(group.members))
            elif unknown:
                group.advice.unknown()
        if not self.slots and iterate:
            self.advice.iterated()
        elif not self.slots and unknown:
            self.advice.unknown()
        plan = self._plan
        if plan is None or plan.settings is not self.settings or not plan.fits([weight]):
            plan = self._plan = plan_for([self], [weight])
        # It may be written to, which `writes` sees, or be shared: neither goes together with autograd.
        results = plan.normalize(
            [weight],
            iterate=iterate,
            keep=known is None and (not iterate or block is not None),
            protect=True,
            vectors=None if known is None else [known],
        )
        if self.training and recomputation.maybe_in_checkpoint():
            recomputation.note(self, Source(results, 0).vectors, in_call=False)
        return results

    def adopt(self, weight: Tensor, value: Tensor) -> None:
        """Make a value the weight before normalisation, and estimate its vectors."""
        with torch.no_grad():
            weight.copy_(value)
        self.estimate(weight)

    def estimate(self, weight: Tensor) -> None:
        """Estimate the vectors of a weight that has nothing to do with the one before."""
        vectors, s = self.vectors(weight), self.settings
        if is_sharded(weight):
            ShardedPlan([self], [weight]).estimate_alone(weight)
        elif not composite.wants_plain_operations([weight]):
            sides = self.dim, self.two_sided
            found = estimate_vectors(weight, *sides, hints=vectors, eps=s.eps, backend=s.backend, stack=s.stack)
            write(vectors, found)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the value itself: who assigns to the layer's weight sets the one before normalisation, as in torch."""
        return value

    def extra_repr(self) -> str:
        return self.settings.arguments(self.dim)

    def __prepare_scriptable__(self) -> NoReturn:  # what torch.jit.script asks a module for
        raise RuntimeError(
            f"bssn_fast: {self.name}: torch.jit.script cannot compile the normalisation. Call bssn_fast.remove on a "
            "copy of the model and script that, or use torch.jit.trace or torch.export in evaluation"
        )

    def _replicate_for_data_parallel(self) -> SpectralNormalization:
        """Return what takes its place on one of torch.nn.DataParallel's devices, for one call: see `replicas`."""
        if sharing.block_of(self) is not None:
            raise RuntimeError(
                f"bssn_fast: {self.name}: calls of torch.nn.DataParallel cannot share a normalisation. Use "
                "torch.nn.parallel.DistributedDataParallel, or call the model outside of blocks of `cached`"
            )
        self.used, self.measured.sigma = True, None  # which is computed when somebody asks for it
        replica = cast(SpectralNormalization, super()._replicate_for_data_parallel())
        held = any(call.entries[j] is not None for call, j in self._running())  # copies are made in a model's call
        # torch has sent the vectors already: before the first use each device looks whether they belong to the weight.
        replica.__dict__.update(_nothing_at_hand(), measured=Measured(), origin=self, held=held)
        replica._beginning = self._beginning
        return replica

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SpectralNormalization:
        # `.half()` and `.bfloat16()` reach vectors and gain too, which must keep their precision.
        kept, gain = self._stored(), None if self.gain is None else self.gain.detach()
        grad = None if self.gain is None else self.gain.grad
        super()._apply(fn, recurse)
        if gain is not None and self.gain is not None and compute_dtype(self.gain.dtype) != self.gain.dtype:
            self.gain.data = gain.to(self.gain.device, torch.float32)
            self.gain.grad = None if grad is None else grad.to(self.gain.device, torch.float32)
        for name, old, new in zip(self.vector_names, kept, self._stored(), strict=True):
            if compute_dtype(new.dtype) != new.dtype:
                self._buffers[name] = old.to(new.device, torch.float32)
        return self


def _nothing_at_hand() -> dict[str, Any]:
    return {"slots": (), "_plan": None, "seen": None, "_beginning": None, "traced": Traced()}
