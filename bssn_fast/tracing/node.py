"""The node that torch.compile puts into its graphs for one call of the operation.

Its inside (memory, autograd) is left to AOTAutograd: it sees that the vectors change, and which layers get a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._higher_order_ops.wrap import TagActivationCheckpoint

from bssn_fast.calls import composite
from bssn_fast.calls.normalizer import Normalizer
from bssn_fast.laws import Law
from bssn_fast.layout import Stack

torch.compiler.allow_in_graph(composite.write)  # what it asks of a transform, Dynamo cannot answer


@torch._dynamo.assume_constant_result
def in_transform() -> bool:
    """Whether a transform of torch.func is being compiled: Dynamo applies it while it traces, and here asks Python."""
    return composite.in_transform()


@torch.compiler.allow_in_graph
def normalize(
    weights: list[Tensor],
    vectors: list[Tensor],
    dims: list[int],
    two_sided: list[bool],
    counts: list[int],
    indexed: list[bool],
    kinds: list[int],
    numbers: list[float],
    gains: list[Tensor],
    eps: float,
    n_power_iterations: int,
    dtype: torch.dtype,
    backend: str,
    gradient_groups: int,
) -> tuple[Tensor, ...]:
    """Return the normalised weights, with a graph, and then sigma; `Normalizer` documents the arguments.

    counts, indexed: of each weight, its `layout.Stack`.
    """
    if n_power_iterations and _in_checkpoint():
        raise RuntimeError(
            "bssn_fast: torch.utils.checkpoint around the normalisation of weights cannot be compiled, as the backward "
            "pass would iterate again and find other weights. Use it inside the module given to bssn_fast.apply, "
            "around parts of it, or leave the call of the checkpoint out of what is compiled"
        )
    # A number that changes from call to call is a symbol to Dynamo, by which the op cannot be called: `float` makes it
    # a constant, and its value a condition for using the graph again.
    laws, stacks = list(map(Law, kinds, map(float, numbers))), list(map(Stack, counts, indexed))
    normalizer = Normalizer(
        weights, dims, two_sided, laws=laws, eps=eps, backend=backend, gradient_groups=gradient_groups, stacks=stacks
    )
    values = normalizer.compute(weights, vectors, n_power_iterations, dtype, gains)
    return (*normalizer.attach(values, weights, gains), values.sigma)


def _in_checkpoint() -> bool:
    """Whether what Dynamo traces now will be repeated in the backward pass.

    Dynamo itself refuses this as soon as Python objects change, which is not always, and which
    `torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint` allows.
    """
    try:
        inside: list[tuple[str, Any]] = InstructionTranslator.current_tx().output.current_tracer.source_fn_stack
    except AttributeError:  # nothing is being traced
        return False
    return any(isinstance(function, TagActivationCheckpoint) for _, function in inside)
