import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrix import MEMORY, place

from bssn_fast import layout


@pytest.mark.parametrize(
    ("shape", "dim", "expected"),
    [((8, 3, 5, 2), 0, (8, 3, 10)), ((8, 3, 5, 2), 1, (3, 8, 10)), ((7, 4), 0, (7, 4, 1)), ((7, 4), 1, (4, 7, 1))],
)
def test_channels(shape, dim, expected):
    assert layout.channels(shape, dim) == expected


def test_vector_sizes():
    assert layout.vector_sizes((8, 3, 5, 2), 0, True) == (8, 30, 3, 80)
    assert layout.vector_sizes((8, 3, 5, 2), 1, True) == (3, 80, 8, 30)
    assert layout.vector_sizes((8, 3, 5, 2), 1, False) == (3, 80)


def test_two_sides_only_where_they_differ():
    assert layout.needs_two_sides((8, 3, 3))
    assert layout.needs_two_sides((1, 1, 2, 2))
    assert not layout.needs_two_sides((8, 3))
    assert not layout.needs_two_sides((8, 3, 1, 1))


def test_compute_dtype():
    assert layout.compute_dtype(torch.float64) == torch.float64
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert layout.compute_dtype(dtype) == torch.float32


shapes = st.lists(st.integers(1, 7), min_size=2, max_size=5).map(tuple)


@given(st.lists(st.tuples(shapes, st.integers(0, 1), st.booleans()), min_size=1, max_size=6))
def test_snapshots_hold_every_vector_once_and_aligned(layers):
    weights = [torch.empty(shape) for shape, _, _ in layers]
    batch = layout.Batch.of(weights, [d for _, d, _ in layers], [b for _, _, b in layers])
    snapshot = torch.zeros(batch.snapshot_size)
    for views, (shape, dim, both) in zip(batch.snapshot_views(snapshot), layers, strict=True):
        assert tuple(map(len, views)) == layout.vector_sizes(shape, dim, both)
        for view in views:
            assert view.storage_offset() % layout.VECTOR_ALIGNMENT == 0
            view += 1
    assert snapshot.max() == 1
    assert snapshot.sum() == sum(sum(layout.vector_sizes(*layer)) for layer in layers)


@given(st.lists(st.tuples(shapes, st.sampled_from(MEMORY)), min_size=1, max_size=6))
def test_views_have_the_weights_strides_and_do_not_overlap(layers):
    weights = [place(torch.empty(shape), memory) for shape, memory in layers]
    batch = layout.Batch.of(weights, [0] * len(weights), [False] * len(weights))
    flat = torch.zeros(batch.size)
    for view, weight in zip(batch.parts(flat), weights, strict=True):
        assert view.shape == weight.shape
        assert view.stride() == weight.stride()
        assert view.storage_offset() % batch.ALIGNMENT == 0
        view += 1
    assert flat.max() == 1
    assert flat.sum() == sum(w.numel() for w in weights)


@pytest.mark.parametrize("by_torch", [True, False])
def test_parts_are_no_views(monkeypatch, by_torch):
    """Also where a torch lacks the private function that makes them, in a buffer that begins anywhere."""
    if not by_torch:
        monkeypatch.setattr(layout, "_reinterpret_tensor", layout._part_by_view)
    batch = layout.Batch.of([torch.empty(3, 2), torch.empty(2, 5)], [0, 0], [False, False])
    whole = torch.zeros(batch.size + 7)
    parts = batch.parts(whole[7:])
    for part in parts:
        part += 1
    assert not any(part._is_view() for part in parts)
    assert whole._version == 0
    assert not whole[:7].any()
    assert whole.sum() == 16


def test_is_dense():
    dense = torch.empty(4, 3, 2, 5)
    for order in itertools.permutations(range(4)):
        assert layout.is_dense(dense.permute(order))
    assert layout.is_dense(torch.empty(4, 1, 3)[:, :, :])
    assert layout.is_dense(torch.empty(10, 6)[2:4])
    for gaps in (dense[:, :2], dense[..., ::2], torch.empty(1, 1).expand(2, 3), torch.empty(6, 1).expand(6, 6)):
        assert not layout.is_dense(gaps)


def test_same_strides_ignores_dimensions_of_one():
    a = torch.empty(4, 1, 3, 1)
    assert layout.same_strides(a, a.clone().as_strided(a.shape, (3, 77, 1, 5)))
    assert not layout.same_strides(a, a.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3))
