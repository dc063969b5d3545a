"""From tensors to launches: programs are kept from call to call, outputs are passed by address."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import reduce
from operator import or_
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from bssn_fast.backends import reference
from bssn_fast.backends.environment import environment
from bssn_fast.backends.triton import kernels
from bssn_fast.backends.triton.fields import encode
from bssn_fast.backends.triton.geometry import NUM_WARPS, geometry, kept, power_of_two
from bssn_fast.backends.triton.prepared import MAX_ARGUMENTS, Buffers, Cache, Made, Prepared, loading, write_table
from bssn_fast.backends.triton.program import Layer, backward_stages, build, stages
from bssn_fast.laws import Laws, bits
from bssn_fast.layout import Batch

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
MAX_REGISTERS = 128
"""Two programs of 256 threads on a multiprocessor of 64K registers: one loads while the other adds."""

MAX_REGISTERS_OF_ONE = 255
"""One program, in fp64, which would spill registers otherwise, or where weights stay in registers."""

MULTIPROCESSORS = 132
"""Of an H100 or H200: where there is no GPU, in the interpreter."""

_cache = Cache()


def launch_mode() -> str:
    """Return "single" or "phases": BSSN_FAST_TRITON_LAUNCH, or what is known to work on this kind of device."""
    mode = environment("BSSN_FAST_TRITON_LAUNCH") or ("phases" if torch.version.hip else "single")
    if mode not in ("single", "phases"):
        raise ValueError(f"BSSN_FAST_TRITON_LAUNCH must be single or phases, not {mode!r}")
    return mode


def plan() -> str:
    """Return "tiles" or "registers": BSSN_FAST_TRITON_PLAN."""
    name = environment("BSSN_FAST_TRITON_PLAN") or "tiles"
    if name not in ("tiles", "registers"):
        raise ValueError(f"BSSN_FAST_TRITON_PLAN must be tiles or registers, not {name!r}")
    return name


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else MULTIPROCESSORS


def _programs(sigma: Tensor) -> int:
    """Return how many programs run at a time, as MAX_REGISTERS and MAX_REGISTERS_OF_ONE have it."""
    return _multiprocessors(sigma.device) * (1 if sigma.dtype == torch.float64 else 2)


def _addresses(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple([x.data_ptr() for x in tensors])


def _distances(addresses: Sequence[int]) -> tuple[int, ...]:
    """Return the distances in bytes from the first: from call to call the same for tensors that share a buffer."""
    first = addresses[0]
    return tuple([a - first for a in addresses])


def _aligned(offset: int, *addresses: tuple[int, ...]) -> bool:
    """Whether everything that a call reads and writes starts at multiples of 16 bytes."""
    return reduce(or_, (x for part in addresses for x in part), offset) % 16 == 0


def _arguments(addresses: Sequence[int]) -> tuple[int, ...]:
    """Return encoded addresses, padded to a power of two so that few kernels are compiled."""
    chosen = [encode(address) for address in addresses or (0,)]
    return (*chosen, *chosen[-1:] * (power_of_two(len(chosen)) - len(chosen)))


def _law_key(laws: Laws) -> tuple[object, ...]:
    return laws.kinds, laws.numbers, _addresses(laws.gains)


def _per_layer(vectors: Sequence[Any], two_sided: Sequence[bool]) -> list[tuple[Any, ...]]:
    rest = iter(vectors)
    return [tuple(next(rest) for _ in range(4 if both else 2)) for both in two_sided]


def _layers(
    batch: Batch,
    weights: Sequence[Tensor],
    outputs: dict[int, int],
    vectors: Sequence[tuple[int, ...]],
    laws: Laws,
    aligned: bool,
) -> tuple[list[Layer], list[int]]:
    """Return the layers that `outputs` names, with the distances of theirs, and the indices of those not addressable.

    Large layers come first, so that the waits at the end of a launch are for small ones.
    """
    layers, others = [], []
    gains = dict(zip(laws.gained, _addresses(laws.gains), strict=True))
    places = {j: n for n, j in enumerate(j for j in laws.gained if j in outputs)}  # of gradients of gains
    for j in sorted(outputs, key=lambda j: -weights[j].numel()):
        w = weights[j]
        place = geometry(
            batch.shapes[j], batch.strides[j], batch.dims[j], batch.two_sided[j], w.element_size(), aligned
        )
        if place is None:
            others.append(j)
        else:
            start, its_vectors = batch.snapshot_offsets[j], vectors[j] if vectors else ()
            law = laws.kinds[j], laws.numbers[j], gains.get(j, 0), places.get(j, 0)
            layers.append(Layer(j, place, w.data_ptr(), outputs[j], its_vectors, start, law))
    return layers, others


def _ready(
    kernel: Any,
    prepared: Prepared,
    counters: Tensor,
    buffers: Buffers,
    arguments: tuple[Any, ...],
    **constants: Any,
) -> Callable[[], None]:
    """Load the program's kernel, if it has not been, and return what starts its launches.

    `arguments` are those between the buffers and the first tile. All that a kernel is compiled for is in the key under
    which its program is kept.
    """
    program = prepared.program
    before = (prepared.layers, prepared.segments, counters, buffers.scratch, buffers.stats, *arguments)
    options = {
        "SHAPES": program.shapes,
        "N_SEGMENTS": program.n_segments,
        "ACC": TYPES[buffers.scratch.dtype],
        **constants,
        "num_warps": NUM_WARPS,
    }
    if program.kept:
        pieces = max(blocks * steps for *_, blocks, steps in program.shapes)
        piece = max(rows * columns for _, _, _, rows, columns, *_ in program.shapes)
        options |= {"LOOSE_SHAPES": program.loose_shapes, "PIECE": piece, "PIECES": pieces}
    else:
        options |= {"SINGLE": prepared.single, "ALIGNED": prepared.aligned}
    if not torch.version.hip:  # the assembler may choose 128 of itself
        one = program.kept or buffers.scratch.dtype == torch.float64
        options["maxnreg"] = MAX_REGISTERS_OF_ONE if one else MAX_REGISTERS
    if not prepared.loaded:
        with loading(buffers.scratch.device):
            kernels.load(kernel, *before, *program.launches[0][0], **options)
        prepared.loaded = True

    def start() -> None:
        for own, n_programs in program.launches:
            kernel[(n_programs,)](*before, *own, **options)

    return start


def _run(starts: Iterable[Callable[[], None]]) -> None:
    try:
        for start in starts:
            start()
    except BaseException:
        _cache.clear()
        raise


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def forward(
    batch: Batch,
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    laws: Laws,
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
    keep = plan() == "registers" and single
    iterate = n_power_iterations > 0
    inputs = (_addresses(weights), _addresses(vectors))
    outs = _addresses(normalized) or inputs[0]
    out_dtype = normalized[0].dtype if normalized else weights[0].dtype
    distances = _distances(outs)
    offset = (outs[0] | snapshot.data_ptr()) % 16

    def make(write: bool) -> Callable[[], Made]:
        def program() -> Made:
            aligned = _aligned(offset, *inputs, distances)
            stored = _per_layer(inputs[1], batch.two_sided)
            layers, others = _layers(batch, weights, dict(enumerate(distances)), stored, laws, aligned)
            if not layers:
                return None, others
            programs = _programs(sigma)
            cut = kept([x.geometry for x in layers], _multiprocessors(sigma.device)) if keep and write else None
            if cut is not None:  # the tiles of rows write the weight, too
                layers = [x._replace(geometry=g) for x, g in zip(layers, cut, strict=True)]
                programs = _multiprocessors(sigma.device)
            tiles = [stages(x.geometry, iterate=iterate, write=write and cut is None) for x in layers]
            built = build(layers, tiles, single=single, backward=False, programs=programs, kept=cut is not None)
            return Prepared(built, [x.position for x in layers], single, aligned, sigma.device), others

        return program

    key = (
        "forward",
        sigma.device,
        *_law_key(laws),
        weights[0].dtype,
        inputs,
        distances,
        batch,
        offset,
        sigma.data_ptr() % 16,
        out_dtype,
        single,
        keep,
    )
    starts = []
    with _on(sigma.device):
        for iteration in range(max(n_power_iterations, 1)):
            write = bool(normalized) and iteration + 1 >= n_power_iterations
            prepared, counters, others = _cache.get((*key, iterate, write), sigma, make(write))
            if prepared is not None and counters is not None:
                start = _ready(
                    kernels.registers_kernel if prepared.program.kept else kernels.forward_kernel,
                    prepared,
                    counters,
                    Buffers(prepared, sigma),
                    (snapshot, sigma, outs[0], bits(eps)),
                    ITERATE=iterate,
                    W_TYPE=TYPES[weights[0].dtype],
                    OUT_TYPE=TYPES[out_dtype],
                )
                starts.append(start)
        _run(starts)  # not before all kernels are loaded: where that fails, no vector has changed
    stored = _per_layer(vectors, batch.two_sided) if others else []
    for j in others:
        reference.forward(
            Batch.of([weights[j]], [batch.dims[j]], [batch.two_sided[j]]),
            [weights[j]],
            list(stored[j]),
            laws.part([j]) if len(weights) > 1 else laws,
            eps,
            n_power_iterations,
            list(normalized[j : j + 1]),
            snapshot[batch.snapshot_offsets[j][0] :],
            sigma[j : j + 1],
        )


def backward(
    batch: Batch,
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    layers: Sequence[int],
    laws: Laws,
    snapshot: Tensor,
    sigma: Tensor,
    grad_weights: Sequence[Tensor],
    grad_gains: Tensor | None,
) -> None:
    """See `backends`."""
    if not layers:
        return
    single = launch_mode() == "single"
    inputs = _addresses(weights)
    gains_out = sigma if grad_gains is None else grad_gains  # without any, nothing is written there
    grad_addresses = dict(zip(layers, _addresses(grads), strict=True))
    outs = _addresses(grad_weights)
    distances = _distances(outs)
    offset = reduce(or_, grad_addresses.values(), outs[0] | snapshot.data_ptr()) % 16

    def program() -> Made:
        aligned = _aligned(offset, inputs, distances)
        outputs = dict(zip(layers, distances, strict=True))
        placed, others = _layers(batch, weights, outputs, [], laws, aligned)
        if not placed:
            return None, others
        tiles = [backward_stages(x.geometry) for x in placed]
        built = build(placed, tiles, single=single, backward=True, programs=_programs(sigma))
        return Prepared(built, [x.position for x in placed], single, aligned, sigma.device), others

    key = (
        "backward",
        sigma.device,
        *_law_key(laws),
        weights[0].dtype,
        inputs,
        distances,
        batch,
        tuple(layers),
        offset,
        sigma.data_ptr() % 16,
        gains_out.data_ptr() % 16,
        grads[0].dtype,
        single,
    )
    with _on(sigma.device):
        prepared, counters, others = _cache.get(key, sigma, program)
        if prepared is not None and counters is not None:
            buffers = Buffers(prepared, sigma)
            chosen = [grad_addresses[j] for j in prepared.indices]
            table = len(chosen) > MAX_ARGUMENTS
            if table:
                write_table(buffers.addresses, chosen)
            start = _ready(
                kernels.backward_kernel,
                prepared,
                counters,
                buffers,
                (
                    snapshot,
                    sigma,
                    outs[0],
                    buffers.addresses,
                    _arguments([] if table else chosen),
                    gains_out,
                ),
                TABLE=table,
                W_TYPE=TYPES[weights[0].dtype],
                G_TYPE=TYPES[grads[0].dtype],
            )
            _run([start])
    if others:
        places = [list(layers).index(j) for j in others]
        left, results = [grads[n] for n in places], [grad_weights[n] for n in places]
        own = [n for n, j in enumerate(j for j in laws.gained if j in layers) if j in others]
        found = None if grad_gains is None else sigma.new_empty(len(own))
        reference.backward(batch, left, list(weights), others, laws, snapshot, sigma, results, found)
        if grad_gains is not None and found is not None:
            grad_gains[own] = found
