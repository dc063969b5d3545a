"""One layer's spectral normalisation: its vectors, and what torch's parametrize calls when the weight is read."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.parametrize import ParametrizationList

from bssn_fast.estimation import estimate_vectors
from bssn_fast.functional import Normalizer
from bssn_fast.handed import remember, settle, settle_before_looks
from bssn_fast.layout import compute_dtype, needs_two_sides, vector_sizes
from bssn_fast.plain import in_transform
from bssn_fast.plan import LayerState, Plan, checked_vectors, in_backward, is_exporting, signature

VARIANTS = {
    # name: (both directions, multiplied by a constant)
    "sn": (False, False),
    "ssn": (False, True),
    "bsn": (True, False),
    "bssn": (True, True),
}


FIRST_ITERATIONS = 15
"""Power iterations on random first vectors: as many as torch's parametrization does."""


class Settings(NamedTuple):
    """What `apply` was told for a layer; its arguments' meanings are documented there."""

    variant: str
    scale: float
    eps: float
    n_power_iterations: int
    update: str
    backend: str
    gradient_groups: int


class _Forward(NamedTuple):
    """A normalisation that changed the vectors."""

    grad_mode: bool
    graphs: tuple[weakref.ref[Any], ...]  # the autograd nodes that lead to the weights, if there are any
    over: bool = False  # a transform of torch.func makes its own backward pass, which recomputes nothing

    def finished(self) -> bool:
        """Whether no backward pass can recompute it any more; False if that is not known."""
        return self.over or (bool(self.graphs) and all(map(_freed, self.graphs)))


def _freed(graph: weakref.ref[Any]) -> bool:
    """Whether an autograd node is gone, or a backward pass has gone through it."""
    node = graph()
    if node is None:
        return True
    try:
        _ = node.saved_tensors
    except RuntimeError:
        return True
    return False


class Usage:
    """How the layers of one `apply` have been used; with update="access", those of one layer.

    Recomputing a checkpointed forward must use the vectors of that forward. The buffers hold those of the latest one;
    if an earlier one may be asked for, nothing tells which it is.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.model_called = False
        self._compiled = False  # compiled code has normalised since the latest of `_forwards`
        self.warned = False
        self._alone = 0
        self._recomputed = False
        self._forwards: list[_Forward] = []  # since the last backward pass that recomputed, the latest one last

    def __getstate__(self) -> dict[str, Any]:  # the forwards of a model are not those of its copy
        return {**self.__dict__, "_recomputed": False, "_forwards": []}

    def count(self, results: Sequence[Sequence[Tensor]]) -> None:
        """A normalisation that changed the vectors, and what came of it, by the graphs that lead to the weights."""
        if self._recomputed:
            self._recomputed = False
            self._forwards.clear()
        self._compiled = False
        over, graphs = in_transform(), []
        for part in results if not over else ():
            for w in part:
                graph = w.grad_fn
                if graph is not None:
                    graphs.append(weakref.ref(graph))
                    break
        latest = _Forward(torch.is_grad_enabled(), tuple(graphs), over)
        older = [f for f in self._forwards if not f.finished()]
        if len(older) > 1:  # of those without a graph nothing tells when they are over: one of a kind will do
            older = [f for j, f in enumerate(older) if f.graphs or f not in older[:j]]
        self._forwards = [*older, latest]

    def note_compiled(self, *, iterated: bool) -> None:
        """Compiled code has normalised, which can tell no more of it than this."""
        self.model_called = True
        if iterated:
            self._compiled = True

    def recompute(self, *, inside: bool) -> None:
        """A forward repeated in a backward pass; raises RuntimeError if it is not known which one.

        inside: the normalisation lay inside the checkpoint, which may have switched grad mode off.
        """
        if self._compiled or any((inside or f.grad_mode) and not f.finished() for f in self._forwards[:-1]):
            raise RuntimeError(
                "bssn_fast: a checkpointed forward is recomputed, but the model was normalised several times since the "
                "last backward pass and it is not known which of these is meant. Run the forwards in "
                "`with bssn_fast.cached(model):`, which makes them share one normalisation, or run a backward pass "
                "after each."
            )
        self._recomputed = True

    def written(self) -> None:
        """A weight was initialised: layers were read for that, and not to compute with them."""
        self._alone = 0

    def normalized_alone(self) -> None:
        """Warn, once, if a whole model is normalised layer by layer."""
        self._alone += 1
        if self.layers > 1 and not self.model_called and not self.warned and self._alone >= 2 * self.layers:
            self.warned = True
            warnings.warn(
                "bssn_fast: the layers are normalised one by one, which is slow, because the module given to "
                "`bssn_fast.apply` is never called itself. Apply it to the module whose forward is called "
                "(`model(x)`, not `model.forward(x)`), or choose update='access' if one by one is what you want.",
                stacklevel=2,
            )


class SpectralNormalization(nn.Module):
    """Parametrization that gives c W / sigma(W), sigma being a spectral norm or the mean of the two unfoldings'.

    Buffers, in float32 (float64 for float64 weights), also after `.half()`: `_u` [c_out] and `_v` [c_in k], the names
    of torch.nn.utils.parametrizations.spectral_norm; for two directions also `_u_in` [c_in] and `_v_in` [c_out k].
    """

    _u: Tensor
    _v: Tensor

    def __init__(
        self,
        weight: Tensor,
        settings: Settings,
        *,
        dim: int,
        autocast: bool,
        usage: Usage,
        known: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        self.state = LayerState()
        self.dim, self.autocast = dim, autocast
        self.layers = 1  # that share the weight
        self.vector_names: tuple[str, ...] = ()
        self.configure(weight, settings, usage, known)

    def configure(self, weight: Tensor, settings: Settings, usage: Usage, known: Sequence[Tensor] = ()) -> None:
        """Change the settings, and estimate the vectors that are not there yet.

        known: the first vectors, in the order of `vector_names`, if they do not come from the buffers.
        """
        self.settings, self.usage = settings, usage
        self.two_sided = VARIANTS[settings.variant][0] and needs_two_sides(weight.shape)
        known = known or self._stored()
        for name in self.vector_names:
            del self._buffers[name]
        self.vector_names = ("_u", "_v", "_u_in", "_v_in") if self.two_sided else ("_u", "_v")
        kept = [vector.detach().clone() for vector in known[: len(self.vector_names)]]
        sizes = vector_sizes(weight.shape, self.dim, self.two_sided)
        for j, (name, size) in enumerate(zip(self.vector_names, sizes, strict=True)):
            self.register_buffer(name, kept[j].clone() if j < len(kept) else random_direction(weight, size))
        if len(kept) < len(self.vector_names):
            self._compute(weight, FIRST_ITERATIONS)
            for stored, vector in zip(self._stored(), kept, strict=False):
                stored.copy_(vector)
        self.state.generation += 1
        self.state.withdraw()  # in a `cached` block there may be a result of the settings before
        self.evaluate(weight)

    def _compute(self, weight: Tensor, n_power_iterations: int) -> Tensor:
        s = self.settings
        normalizer = Normalizer([weight], [self.dim], [self.two_sided], scale=s.scale, eps=s.eps, backend=s.backend)
        values = normalizer.compute([weight.detach()], self.vectors(weight), n_power_iterations, weight.dtype)
        self.state.sigma, self.state.index = values.sigma, 0
        return values.normalized[0]

    def evaluate(self, weight: Tensor) -> Tensor:
        """Return the normalised weight, without a graph, that the vectors as they are give."""
        return self._compute(weight, 0)

    def sigma_of(self, weight: Tensor) -> Tensor:
        """Return sigma of the last normalisation; where that was part of compiled code, compute it."""
        if self.state.sigma is None:
            self.evaluate(weight)
        return self.state.current_sigma()

    def _stored(self) -> list[Tensor]:
        return [cast(Tensor, self._buffers[name]) for name in self.vector_names]

    def vectors(self, weight: Tensor) -> list[Tensor]:
        """Return the buffers u_out, v_out[, u_in, v_in], made to fit the weight's dtype and device."""
        found = self._stored()
        checked = checked_vectors(found, weight, vector_sizes(weight.shape, self.dim, self.two_sided))
        if checked is not found:
            for name, vector in zip(self.vector_names, checked, strict=True):
                self._buffers[name] = vector
        return checked

    def forward(self, weight: Tensor) -> Tensor:
        """Return the normalised weight: the one of the current model call, or one made for this access alone."""
        settle()
        state = self.state
        ready = state.usable(weight)
        if ready is not None:
            return ready
        if is_dynamo_compiling() or is_exporting():
            from bssn_fast import compiled  # with it comes torch's compiler, which takes long to import

            return compiled.normalize_alone(self, weight)
        recomputation = in_backward()
        iterate = self.training and not recomputation and not state.holds(weight)
        if recomputation and self.training:
            self.usage.recompute(inside=self.settings.update == "access")
        elif iterate and self.settings.update == "forward":
            self.usage.normalized_alone()
        if (
            state.plan is None
            or state.plan.settings is not self.settings
            or state.plan.signature != signature([weight])
        ):
            state.plan = Plan([self], [weight])
        keep = not iterate or state.cached > 0
        # It may be written to, which `remember` sees, or be shared: neither goes together with autograd.
        (normalized,) = state.plan.normalize([weight], iterate=iterate, keep=keep, protect=True)
        if iterate:
            self.usage.count([[normalized]])
        if state.cached and not recomputation:
            if in_transform():
                state.note_iteration(weight)
            else:
                state.offer(weight, normalized)
        elif not recomputation:
            remember(self, weight, normalized)
        return normalized

    def adopt(self, weight: Tensor, value: Tensor) -> None:
        """Make a value the weight before normalisation, and estimate its vectors."""
        with torch.no_grad():
            weight.copy_(value)
        self.usage.written()
        self.estimate(weight)

    def estimate(self, weight: Tensor) -> None:
        """Estimate the vectors of a weight that has nothing to do with the one before."""
        vectors, s = self.vectors(weight), self.settings
        found = estimate_vectors(weight, self.dim, self.two_sided, hints=vectors, eps=s.eps, backend=s.backend)
        with torch.no_grad():
            for vector, new in zip(vectors, found, strict=True):
                vector.copy_(new)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the value itself: who assigns to the layer's weight sets the one before normalisation, as in torch."""
        return value

    def extra_repr(self) -> str:
        variant, scale, eps, n_power_iterations, *_ = self.settings
        shown = f"{variant!r}, dim={self.dim}, n_power_iterations={n_power_iterations}, eps={eps}"
        return f"{shown}, scale={scale:.4g}" if VARIANTS[variant][1] else shown

    def train(self, mode: bool = True) -> SpectralNormalization:
        if mode != self.training:
            self.state.forget()  # what few elements, written through `.data`, have changed would go unseen
        super().train(mode)
        return self

    def _replicate_for_data_parallel(self) -> SpectralNormalization:
        raise RuntimeError(
            "bssn_fast: torch.nn.DataParallel runs copies of a model whose vectors are thrown away; "
            "use torch.nn.parallel.DistributedDataParallel"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SpectralNormalization:
        # `.half()` and `.bfloat16()` reach the vectors too, which must keep their precision.
        kept = self._stored()
        super()._apply(fn, recurse)
        for name, old, new in zip(self.vector_names, kept, self._stored(), strict=True):
            if compute_dtype(new.dtype) != new.dtype:
                self._buffers[name] = old.to(new.device, torch.float32)
        return self


def parametrizations_of(module: nn.Module, tensor_name: str) -> ParametrizationList:
    """Return what torch's parametrize keeps for a parametrized tensor of a module."""
    return cast(ParametrizationList, cast(Any, module).parametrizations[tensor_name])


def original_of(layer: ParametrizationList) -> Tensor:
    """Return the weight before normalisation; quicker than the attribute `original`."""
    return cast(Tensor, layer._parameters["original"])


def quick_access(module: nn.Module, tensor_name: str) -> None:
    """Let the module's parametrized attribute find the normalised weight of the current model call at once.

    torch's way there leads through two module calls, which cost more than the whole normalisation of a small model.
    """
    kind = type(module)  # the class that parametrize has made for this module alone
    slow = kind.__dict__[tensor_name]

    def get(self: Any) -> Any:
        layer = self._modules["parametrizations"]._modules[tensor_name]
        if len(layer._modules) == 1:
            ready = layer._modules["0"].state.usable(layer._parameters["original"])
            if ready is not None:
                return ready
        return slow.fget(self)

    def put(self: Any, value: Tensor) -> None:
        layer = self.parametrizations[tensor_name]
        shape = original_of(layer).shape
        if isinstance(value, Tensor) and value.shape != shape:
            raise ValueError(
                f"{kind.__name__}: a weight of shape {tuple(shape)} cannot be replaced by one of shape "
                f"{tuple(value.shape)}, which its vectors do not fit; call bssn_fast.remove before a weight changes "
                "shape, and apply again"
            )
        slow.fset(self, value)
        if len(layer) == 1:
            layer[0].estimate(original_of(layer))

    setattr(kind, tensor_name, property(get, put))
    settle_before_looks(kind)


def random_direction(weight: Tensor, size: int) -> Tensor:
    """Return a random unit vector [size] as torch draws its u and v: one normal_ on the weight's device."""
    vector = torch.empty(size, dtype=compute_dtype(weight.dtype), device=weight.device).normal_(0, 1)
    return nn.functional.normalize(vector, dim=0, eps=1e-12)
