"""What one rank holds of a weight that is a DTensor, and how its products with vectors lie in the whole ones."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bssn_fast import reference
from bssn_fast.layout import input_dimension

Index = tuple[Any, ...]
"""Slices, or tensors of indices, one for each dimension of a view of a vector."""


class Part:
    """The elements of a weight that this rank holds.

    Any dimension may be sharded, over several dimensions of a mesh too, in shards of different sizes or none, and
    strided ones, as FSDP2 makes them of shards of tensor parallelism.

    group: all ranks of the weight's mesh.
    counts: whether this rank speaks for its elements: of ranks with the same ones only the first does. So all ranks get
        the bits of one sum, replicas too.
    leads: this is the group's first rank.
    """

    def __init__(self, weight: Any) -> None:
        mesh, placements = weight.device_mesh, weight.placements
        self.shape, self.local_shape = tuple(weight.shape), tuple(weight.to_local().shape)
        coordinate = mesh.get_coordinate()
        assert coordinate is not None, "refused by `refuse_unfit`"
        self._held = [_held(d, self.shape, mesh, placements, coordinate) for d in range(len(self.shape))]
        found = tuple(map(len, self._held))
        if found != self.local_shape:
            raise RuntimeError(f"a shard of shape {self.local_shape} was expected to be {found}, of {placements}")
        self.group = _group_of(mesh)
        self.leads = not any(coordinate)
        self.counts = not any(at for at, p in zip(coordinate, placements, strict=True) if _sharded_dimension(p) is None)
        self._device = weight.device
        self._at: dict[tuple[int, ...], Index] = {}

    def at(self, dims: tuple[int, ...]) -> Index:
        """Return the index, into a whole tensor of these stored dimensions, of what this rank holds."""
        found = self._at.get(dims)
        if found is None:
            held = [self._held[d] for d in dims]
            if all(_is_range(h) for h in held):
                found = tuple(slice(int(h[0]), int(h[-1]) + 1) if len(h) else slice(0, 0) for h in held)
            else:
                found = tuple(
                    h.to(self._device).view([-1 if a == axis else 1 for a in range(len(dims))])
                    for axis, h in enumerate(held)
                )
            self._at[dims] = found
        return found

    def local_vectors(self, vectors: tuple[Tensor, ...], dim: int) -> tuple[Tensor, ...]:
        """Return of u_out, v_out[, u_in, v_in] what belongs to this rank's rows and columns."""
        found: list[Tensor] = []
        for j in range(0, len(vectors), 2):
            side = Side(self, dim if j == 0 else input_dimension(dim))
            found += [side.of_rows(vectors[j]), side.of_columns(vectors[j + 1])]
        return tuple(found)


class Side:
    """One unfolding of a part: its rows are the stored dimension `dim`, its columns all the others."""

    def __init__(self, part: Part, dim: int) -> None:
        self.part, self.dim = part, dim
        self._rows = (dim,)
        self._columns = tuple(d for d in range(len(part.shape)) if d != dim)

    def of_rows(self, u: Tensor) -> Tensor:
        """Return the elements of a whole u that belong to this rank's rows."""
        return u[self.part.at(self._rows)]

    def of_columns(self, v: Tensor) -> Tensor:
        """Return the elements of a whole v that belong to this rank's columns, flat."""
        return v.view(self._column_shape())[self.part.at(self._columns)].reshape(-1)

    def add_product(self, out: Tensor, local: Tensor, v: Tensor) -> None:
        """Write this rank's part of W v into zeros [rows]; local: its elements, in the vectors' dtype."""
        if self.part.counts:
            out[self.part.at(self._rows)] = reference.product(reference.unfold(local, self.dim), self.of_columns(v))

    def add_transposed_product(self, out: Tensor, local: Tensor, u: Tensor) -> None:
        """Write this rank's part of Wᵀ u into zeros [columns]."""
        if self.part.counts:
            found = reference.product(reference.unfold(local, self.dim).mT, self.of_rows(u))
            shape = [self.part.local_shape[d] for d in self._columns]
            out.view(self._column_shape())[self.part.at(self._columns)] = found.view(shape)

    def local_sigma(self, local: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return this rank's part of uᵀ W v, a scalar."""
        if not self.part.counts:
            return u.new_zeros(())
        return self.of_rows(u) @ reference.product(reference.unfold(local, self.dim), self.of_columns(v))

    def _column_shape(self) -> list[int]:
        return [self.part.shape[d] for d in self._columns]


def _sharded_dimension(placement: Any) -> int | None:
    """Return the tensor dimension that a placement shards; None for one that replicates."""
    return getattr(placement, "dim", None)  # of Shard and _StridedShard, which is no Shard in newer versions of torch


def _held(dim: int, shape: tuple[int, ...], mesh: Any, placements: Any, coordinate: Any) -> Tensor:
    """Return the indices of a stored dimension that this rank holds, in the order in which it holds them.

    The placements' own way of splitting a tensor is asked, as they do it from the first mesh dimension to the last.
    """
    held = torch.arange(shape[dim], device="cpu").view([-1 if d == dim else 1 for d in range(len(shape))])
    for j, placement in enumerate(placements):
        if _sharded_dimension(placement) in (dim, dim - len(shape)):
            chunks, _ = placement._split_tensor(held, mesh.size(j), with_padding=False, contiguous=False)
            held = chunks[coordinate[j]]
    return held.flatten()


def _is_range(indices: Tensor) -> bool:
    return len(indices) == 0 or int(indices[-1] - indices[0]) == len(indices) - 1


_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""Groups of all ranks of meshes of several dimensions; they end with their mesh, or their threads would outlive it."""


def _group_of(mesh: Any) -> Any:
    """Return the group of all ranks of a mesh; where it has to be made, all of them must ask at the same time."""
    if mesh.ndim == 1:
        return mesh.get_group()
    ranks = mesh.mesh.flatten().tolist()
    if sorted(ranks) == list(range(dist.get_world_size())):
        return dist.group.WORLD
    found = _groups.get(mesh)
    if found is None:
        found = _groups[mesh] = dist.new_group(ranks, use_local_synchronization=True)
    return found
