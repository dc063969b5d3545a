"""Geometry of the weights: sizes of the two unfoldings and of the vectors that belong to them.

A weight is read as W[o, i, k]: output channel, input channel, kernel position. `dim` says which stored dimension is
the output: 0 for convolutions, linear and embedding layers, 1 for transposed convolutions, or any other. The input
channel is the first of the other dimensions; those that are left are kernel positions. Kernels take weights whose
output is dimension 0 or 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, repeat
from math import prod
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

T = TypeVar("T")


def _part_by_view(flat: Tensor, shape: Sequence[int], strides: Sequence[int], offset: int) -> Tensor:
    return flat.as_strided(shape, strides, flat.storage_offset() + offset).data


# A tensor in another one's memory that is no view of it: torch's own, of which its compiler makes use, is quicker.
_reinterpret_tensor = getattr(torch._C._dynamo.guards, "_reinterpret_tensor", _part_by_view)

VECTOR_ALIGNMENT = 4
"""Every vector of a snapshot starts at a multiple of this many elements: 16 bytes in fp32."""


def input_dimension(dim: int) -> int:
    """Return which stored dimension is the input channel, `dim` being the output."""
    return int(dim == 0)


def channels(shape: Sequence[int], dim: int) -> tuple[int, int, int]:
    """Return (c_out, c_in, k) of a weight's shape, k being the product of the kernel sizes."""
    c_in, *kernel = (*shape[:dim], *shape[dim + 1 :], 1)  # one input channel where there is no such dimension
    return shape[dim], c_in, prod(kernel)


def vector_sizes(shape: Sequence[int], dim: int, two_sided: bool) -> tuple[int, ...]:
    """Return the lengths of (u_out, v_out) or, for two directions, of (u_out, v_out, u_in, v_in).

    A weight of one dimension has none: its spectral norm is its length.
    """
    if len(shape) == 1:
        return ()
    c_out, c_in, k = channels(shape, dim)
    out_side = (c_out, c_in * k)
    return (*out_side, c_in, c_out * k) if two_sided else out_side


class Stack(NamedTuple):
    """The matrices that a weight holds, n equal parts of its first dimension; each is normalised by itself.

    What `apply` calls the weight's blocks.
    """

    n: int = 1
    indexed: bool = False
    """Whether the first dimension does nothing but number them: each is W[j] then, else W[j * m : (j + 1) * m]."""

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a weight of this shape can be divided so."""
        return shape[0] == self.n if self.indexed else shape[0] % self.n == 0

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of each matrix, of the weight's."""
        return tuple(shape[1:]) if self.indexed else (shape[0] // self.n, *shape[1:])

    def parts(self, weight: Tensor) -> Sequence[Tensor]:
        """Return the matrices as views of the weight, or of a tensor of its shape."""
        if self == ONE:
            return (weight,)
        return weight.unbind(0) if self.indexed else weight.chunk(self.n)

    def numbered(self, weight: Tensor) -> Tensor:
        """Return the weight as [n, *matrix], for functions that torch.vmap calls with each matrix."""
        return weight if self.indexed else weight.unflatten(0, (self.n, -1))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return a tensor of the weight's shape that holds the parts."""
        if self == ONE:
            return parts[0]
        return torch.stack(list(parts)) if self.indexed else torch.cat(list(parts))

    def vector_shapes(self, shape: Sequence[int], dim: int, two_sided: bool) -> list[tuple[int, ...]]:
        """Return the shapes of a weight's vectors: [size], or [n, size] where it holds several matrices."""
        sizes = vector_sizes(self.shape(shape), dim, two_sided)
        return [(size,) if self == ONE else (self.n, size) for size in sizes]

    def vectors(self, vectors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Return each matrix's vectors, as views of the weight's."""
        if self == ONE or not vectors:
            return [tuple(vectors)] * self.n
        return list(zip(*[v.unbind(0) for v in vectors], strict=True))

    def each(self, weight: Tensor, vectors: Sequence[Tensor]) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Yield each matrix with its vectors."""
        return zip(self.parts(weight), self.vectors(vectors), strict=True)

    def join_vectors(self, vectors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return the weight's vectors, of each matrix's."""
        return list(vectors[0]) if self == ONE else [torch.stack(each) for each in zip(*vectors, strict=True)]

    def suffix(self, j: int) -> str:
        """Return what the j-th matrix's name is, after the weight's."""
        return "" if self == ONE else f"[{j}]"

    def join_numbers(self, numbers: Sequence[Tensor]) -> Tensor:
        """Return one number, or [n], of each matrix's scalar tensor."""
        return numbers[0] if self == ONE else torch.stack(list(numbers))


ONE = Stack()
"""A weight that is one matrix, as nearly all are."""


def needs_two_sides(shape: Sequence[int], dim: int = 0) -> bool:
    """Whether the two unfoldings differ: they are transposes of each other when k = 1."""
    return channels(shape, dim)[2] != 1


def fits_kernels(weight: Tensor, dim: int) -> bool:
    """Whether there are kernels for such a weight: real, of two dimensions or more, the output being 0 or 1."""
    return weight.ndim > 1 and dim < 2 and not weight.is_complex()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of vectors, sigma and arithmetic for a weight's dtype: fp64 for fp64, its own if complex, else fp32."""
    return dtype if dtype == torch.float64 or dtype.is_complex else torch.float32


def _aligned(size: int) -> int:
    """Return how many elements a vector takes in a snapshot."""
    return -(-size // VECTOR_ALIGNMENT) * VECTOR_ALIGNMENT


def _snapshot_offsets(
    shapes: tuple[tuple[int, ...], ...], dims: tuple[int, ...], two_sided: tuple[bool, ...]
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Return where each layer's vectors start in a snapshot (in elements), and the snapshot's length."""
    offsets, end = [], 0
    for shape, dim, both in zip(shapes, dims, two_sided, strict=True):
        starts = []
        for size in vector_sizes(shape, dim, both):
            starts.append(end)
            end += _aligned(size)
        offsets.append(tuple(starts))
    return tuple(offsets), end


def picked(items: list[T], positions: Sequence[int]) -> list[T]:
    """Return the items at these positions; the same list, which is quick, if these are all in order."""
    return items if are_all(positions, len(items)) else [items[j] for j in positions]


def are_all(positions: Sequence[int], n: int) -> bool:
    """Whether these are 0 to n - 1 in order."""
    return len(positions) == n and tuple(positions) == _first(n)


@lru_cache(maxsize=256)
def _first(n: int) -> tuple[int, ...]:
    return tuple(range(n))


Shapes = tuple[tuple[int, ...], ...]
"""The shape or the strides of each weight."""


class Batch:
    """The geometry of the weights of one call, and where their normalised copies lie in one flat buffer.

    stacks: of each weight; none where each weight is one matrix.
    rows: the geometry of the single matrices, one row of a kernel's table each: this one, if no weight holds several.
    first_rows: of each weight, the index of its first matrix in `rows`; last, the number of all.

    Whoever keeps things for a geometry, by this object, finds them again at the next call: `of` returns the same one
    for the same weights, or others like them.
    """

    rows: Batch
    snapshot_offsets: tuple[tuple[int, ...], ...]
    snapshot_size: int

    ALIGNMENT = 32
    """Every weight starts at a multiple of this many elements: at least 64 bytes, a cache line, for every dtype."""

    def __init__(
        self,
        shapes: Shapes,
        strides: Shapes,
        dims: tuple[int, ...],
        two_sided: tuple[bool, ...],
        stacks: tuple[Stack, ...] = (),
    ) -> None:
        self.shapes, self.strides, self.dims, self.two_sided, self.stacks = shapes, strides, dims, two_sided, stacks
        self.rows, self.first_rows = self, list(range(len(shapes) + 1))
        if stacks:
            counts = [stack.n for stack in stacks]
            self.first_rows = list(accumulate(counts, initial=0))
            fields = zip(
                [stack.shape(shape) for stack, shape in zip(stacks, shapes, strict=True)],
                [stride[stack.indexed :] for stack, stride in zip(stacks, strides, strict=True)],
                dims,
                two_sided,
                strict=True,
            )
            repeated = [row for row, count in zip(fields, counts, strict=True) for _ in range(count)]
            self.rows = Batch(*zip(*repeated, strict=True))
            self.snapshot_size = self.rows.snapshot_size
            self.snapshot_offsets = tuple([self.rows.snapshot_offsets[first] for first in self.first_rows[:-1]])
        else:
            self.snapshot_offsets, self.snapshot_size = _snapshot_offsets(shapes, dims, two_sided)
        self.starts, self.size = [], 0
        for shape in self.shapes:
            self.starts.append(self.size)
            self.size += -(-prod(shape) // self.ALIGNMENT) * self.ALIGNMENT

    @staticmethod
    def of(
        weights: Sequence[Tensor], dims: Sequence[int], two_sided: Sequence[bool], stacks: Sequence[Stack] = ()
    ) -> Batch:
        """Return the geometry of these weights."""
        shapes, strides = tuple([tuple(w.shape) for w in weights]), tuple([w.stride() for w in weights])
        several = any(stack != ONE for stack in stacks)
        return _batch(shapes, strides, tuple(dims), tuple(two_sided), tuple(stacks) if several else ())

    @torch.no_grad()
    def split(self, tensors: Sequence[Tensor], layers: Sequence[int] | None = None) -> list[Tensor]:
        """Return the matrices of all weights, or of those of some layers, as views."""
        stacks = self.stacks if layers is None else [self.stacks[j] for j in layers]
        return [part for tensor, stack in zip(tensors, stacks, strict=True) for part in stack.parts(tensor)]

    @torch.no_grad()
    def split_vectors(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the matrices' vectors one after another, of the weights'."""
        rest, found = iter(vectors), []
        for stack, both in zip(self.stacks, self.two_sided, strict=True):
            own = [next(rest) for _ in range(4 if both else 2)]
            found += [v for group in stack.vectors(own) for v in group]
        return found

    def rows_of(self, layers: Sequence[int]) -> list[int]:
        """Return the indices of the matrices of some weights."""
        return [r for j in layers for r in range(self.first_rows[j], self.first_rows[j + 1])]

    def fits(self, weights: Sequence[Tensor]) -> bool:
        """Whether weights lie in memory like this."""
        if self.shapes != tuple([w.shape for w in weights]):
            return False
        strides = tuple([w.stride() for w in weights])
        return self.strides == strides or all(map(_equal_strides, self.shapes, self.strides, strides))

    def parts(self, flat: Tensor) -> list[Tensor]:
        """Return a tensor in a flat buffer [size] for each weight, with its shape and strides.

        To torch they are no views of it, unless a compiler or a mode follows: what is written into one of them does not
        count as a change of the others. And they take half the time of views.
        """
        part = Tensor.as_strided if torch._C._len_torch_dispatch_stack() > 0 else _reinterpret_tensor
        return list(map(part, repeat(flat), self.shapes, self.strides, self.starts))

    def snapshot_views(self, snapshot: Tensor) -> list[tuple[Tensor, ...]]:
        """Return the vectors of each layer as views of a snapshot."""
        if self.stacks:
            rows, found = self.rows.snapshot_views(snapshot), []
            for j, stack in enumerate(self.stacks):
                own = rows[self.first_rows[j] : self.first_rows[j + 1]]
                length = sum(_aligned(len(v)) for v in own[0])
                found.append(
                    own[0] if stack == ONE else tuple([v.as_strided((stack.n, len(v)), (length, 1)) for v in own[0]])
                )
            return found
        return [
            tuple(
                snapshot[start : start + size]
                for start, size in zip(starts, vector_sizes(shape, dim, both), strict=True)
            )
            for shape, dim, both, starts in zip(
                self.shapes, self.dims, self.two_sided, self.snapshot_offsets, strict=True
            )
        ]


_batch = lru_cache(maxsize=256)(Batch)


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have equal strides wherever a stride matters."""
    return a.stride() == b.stride() or _equal_strides(a.shape, a.stride(), b.stride())


def _equal_strides(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    return all(size == 1 or s == t for size, s, t in zip(shape, a, b, strict=True))


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def has_dense_parts(weight: Tensor, stack: Stack) -> bool:
    """Whether each of a weight's matrices is dense, and the weight with them."""
    return is_dense(weight) and (stack == ONE or is_dense(stack.parts(weight)[0]))


def made_dense(weight: Tensor, stack: Stack = ONE) -> Tensor:
    """Return the weight's values, without a graph if it has to be copied, in a tensor that kernels can read."""
    if weight.is_neg():  # its memory holds the values with the other sign
        weight = weight.detach().resolve_neg()
    return weight if has_dense_parts(weight, stack) else weight.detach().contiguous()


def result_dtype(weight: Tensor, autocast: bool) -> torch.dtype:
    """Return the dtype the layer will compute in: autocast's where it applies, so that no second cast is needed."""
    if not autocast or weight.is_meta or not torch.is_autocast_enabled(weight.device.type):  # raises for "meta"
        return weight.dtype
    if weight.dtype == torch.float64 or weight.is_complex():
        return weight.dtype
    return torch.get_autocast_dtype(weight.device.type)


_NO_MATTER = 0  # the dispatch keys that also tensors with ordinary memory may have or lack, as bits
for _key in ("ADInplaceOrView", "AutogradFunctionality", "AutocastCPU", "AutocastCUDA"):
    _NO_MATTER |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key)).raw_repr()
_MATTER = ~_NO_MATTER
_PLAIN = {torch._C.DispatchKeySet(key).raw_repr() for key in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)}
_dispatch_keys = torch._C._dispatch_keys

PLAIN_CLASSES = {Tensor, torch.nn.Parameter}
"""The classes whose tensors have memory of their own, and nothing that follows what is done with them."""


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but strided numbers in the memory of the CPU or a GPU. Takes a fraction of 1 µs.

    That is what its dispatch keys say: everything that wraps a tensor, that reads its memory in another way, or that
    has none has a key of its own. So this is false for tensors inside a `torch.func` transform or `vmap`, fake,
    functional, meta, sparse, quantized, mkldnn and nested ones, those with a negative or conjugate bit, and subclasses
    with `__torch_dispatch__`. It is true for parameters, for tensors made in inference mode, and for the dual tensors
    of forward-mode AD, which have no key: see `has_tangent`.
    """
    return _dispatch_keys(tensor).raw_repr() & _MATTER in _PLAIN


def has_plain_memory(tensor: Tensor) -> bool:
    """Whether a kernel may read all elements at the tensor's address by its dtype, shape and strides.

    That is, it is plain, and its storage reaches as far: it has not been freed or made smaller.
    """
    return is_plain(tensor) and (tensor.numel() == 0 or (has_its_memory(tensor) and tensor.data_ptr() != 0))


def has_its_memory(tensor: Tensor) -> bool:
    """Whether the storage reaches as far as the elements; not if it has been freed or made smaller."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return tensor.numel() == 0 or end <= tensor.untyped_storage().nbytes()


def has_tangent(tensor: Tensor) -> bool:
    """Whether this is a dual tensor of forward-mode AD, whose derivative a kernel would lose."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
