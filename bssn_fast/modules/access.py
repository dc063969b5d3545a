"""How the attribute of a layer, `layer.weight`, finds the normalised weight."""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.fx import _symbolic_trace as fx
from torch.nn.utils import parametrize

from bssn_fast.modules import writes
from bssn_fast.modules.lists import original_of
from bssn_fast.modules.parametrization import SpectralNormalization
from bssn_fast.tracing.recording import traced_result

recorded_by_fx: Callable[[], bool] = getattr(fx, "is_fx_symbolic_tracing", fx.is_fx_tracing)
"""Whether torch.fx records a model. torch 2.6 has only the second, which later versions warn of."""


def quick_access(module: nn.Module, tensor_name: str) -> None:
    """Let the module's parametrized attribute find the normalised weight of the current model call at once.

    torch's way there leads through two module calls, which cost more than the whole normalisation of a small model.
    """
    kind = type(module)  # the class that parametrize has made for this module alone
    slow = kind.__dict__[tensor_name]

    def get(self: Any) -> Any:
        if is_dynamo_compiling():
            return get_traced(self)
        # Attributes of a module take five times as long as what lies in its dictionary.
        layer = self.__dict__["_modules"]["parametrizations"].__dict__["_modules"][tensor_name]
        state = layer.__dict__
        norm, weight = state["_modules"]["0"], state["_parameters"].get("original")
        its = norm.__dict__
        if (
            len(state["_modules"]) > 1
            or "slots" not in its  # ours has been taken off, and another one is left
            or state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or its["_forward_hooks"]
            or its["_forward_pre_hooks"]
        ):
            return slow.fget(self)  # others may change the weight
        if recorded_by_fx():  # a module's call is recorded, and a tensor would be a constant
            return layer()
        thread = get_ident()
        for group, j in its["slots"]:
            call = group.calls.get(thread)
            if call is not None:
                ready = call.find(j, weight, norm)
                if ready is not None:
                    if call.reads is not None:
                        group.advice.read(call.reads, (id(self), tensor_name), norm)
                    return ready
        if weight is None or weight.is_meta or not weight.numel():
            return layer()  # whose hooks may bring it in, as those of offloading and of pruning do
        return norm.normalized(weight, layer)

    def get_traced(self: Any) -> Any:
        layer = self._modules["parametrizations"]._modules[tensor_name]
        norm = layer._modules["0"]
        hooks = layer._forward_hooks or layer._forward_pre_hooks or norm._forward_hooks or norm._forward_pre_hooks
        if len(layer._modules) > 1 or hooks or not isinstance(norm, SpectralNormalization):
            return slow.fget(self) if parametrize._cache_enabled else layer()  # torch 2.6 cannot compile the first
        ready = traced_result(norm, layer._parameters.get("original"))
        return layer() if ready is None else ready

    def put(self: Any, value: Tensor) -> None:
        layer = self.parametrizations[tensor_name]
        shape = original_of(layer).shape
        if isinstance(value, Tensor) and value.shape != shape:
            raise ValueError(
                f"{kind.__name__}: a weight of shape {tuple(shape)} cannot be replaced by one of shape "
                f"{tuple(value.shape)}, which its vectors do not fit; call bssn_fast.remove before a weight changes "
                "shape, and apply again"
            )
        if isinstance(value, Tensor) and writes.shares_a_result(value):
            value = value.detach().clone()  # torch lets the weight take the value's memory, to which it then writes
        slow.fset(self, value)
        if len(layer) == 1 and isinstance(layer[0], SpectralNormalization):
            layer[0].estimate(original_of(layer))

    setattr(kind, tensor_name, property(get, put))
    writes.settle_before_looks(kind)
