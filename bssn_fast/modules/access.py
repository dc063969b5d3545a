"""How the attribute of a layer, `layer.weight`, finds the normalised weight."""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.fx import _symbolic_trace as fx

from bssn_fast.modules import writes
from bssn_fast.modules.lists import original_of
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
        layer = self._modules["parametrizations"]._modules[tensor_name]
        modules = layer._modules
        if len(modules) > 1:
            return slow.fget(self)
        norm, weight = modules["0"], layer._parameters.get("original")
        if layer._forward_hooks or layer._forward_pre_hooks or norm._forward_hooks or norm._forward_pre_hooks:
            return slow.fget(self)  # they may change the weight
        if is_dynamo_compiling():
            ready = traced_result(norm, weight)
            return layer() if ready is None else ready
        if recorded_by_fx():  # a module's call is recorded, and a tensor would be a constant
            return layer()
        thread = get_ident()
        for group, j in norm.slots:
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
        if len(layer) == 1:
            layer[0].estimate(original_of(layer))

    setattr(kind, tensor_name, property(get, put))
    writes.settle_before_looks(kind)
