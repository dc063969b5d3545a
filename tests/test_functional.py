"""`bssn_fast.normalize`: any number of weights, no modules, differentiable twice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import MEMORY, place
from torch import nn
from torch.autograd import forward_ad

import bssn_fast
from bssn_fast import reference
from bssn_fast.layout import compute_dtype, needs_two_sides, vector_sizes

SHAPES = ((3, 2, 2, 2), (2, 3), (1, 2, 3), (2, 2, 2))


def arguments(shapes, dims, both=True, dtype=torch.float64):
    weights = [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    vectors = []
    for shape, dim in zip(shapes, dims, strict=True):
        sizes = vector_sizes(shape, dim, both and needs_two_sides(shape))
        vectors.append(tuple(reference.unit(torch.randn(n, dtype=compute_dtype(dtype)), 1e-12) for n in sizes))
    return weights, vectors


def clones(vectors):
    return [tuple(v.clone() for v in group) for group in vectors]


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dims", [(0, 0, 0, 0), (1, 0, 1, 1)])
def test_gradcheck_and_gradgradcheck(both, dims):
    weights, vectors = arguments(SHAPES, dims, both)
    bssn_fast.normalize(weights, vectors, dims=dims)

    def run(*ws):
        normalized, _ = bssn_fast.normalize(ws, vectors, dims=dims, scale=1.3, n_power_iterations=0)
        return tuple(normalized)

    assert torch.autograd.gradcheck(run, weights)
    assert torch.autograd.gradgradcheck(run, weights)


@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple),
    dim=st.integers(0, 1),
    memory=st.sampled_from(MEMORY),
    both=st.booleans(),
    n=st.integers(0, 2),
)
@settings(max_examples=25)
def test_gradients_of_gradients_are_those_of_the_reference(shape, dim, memory, both, n):
    weights, vectors = arguments((shape,), (dim,), both)
    weight = place(weights[0].detach(), memory).requires_grad_()
    grad = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    (ours,), sigma = bssn_fast.normalize([weight], clones(vectors), dims=dim, scale=0.7, n_power_iterations=n)
    plain, _, sigma_plain = reference.normalize(weight, vectors[0], dim, scale=0.7, eps=1e-12, n_power_iterations=n)
    torch.testing.assert_close(sigma[0], sigma_plain)
    derivatives = []
    for y in (ours, plain):
        (first,) = torch.autograd.grad(y, weight, grad, create_graph=True)
        derivatives.append((first, *torch.autograd.grad(first.square().sum(), (weight, grad))))
    for found, expected in zip(*derivatives, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10 / sigma[0].abs().item() ** 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("result", [None, torch.float32, torch.bfloat16])
def test_dtypes(dtype, result):
    weights, vectors = arguments(SHAPES, (0,) * 4, dtype=dtype)
    normalized, sigma = bssn_fast.normalize(weights, vectors, dtype=result)
    assert sigma.dtype == torch.float32
    assert all(w.dtype == (result or dtype) for w in normalized)
    sum(w.sum() for w in normalized).backward()
    assert all(w.grad.dtype == dtype for w in weights)


def test_vectors_change_in_place_only_if_asked():
    weights, vectors = arguments(SHAPES, (0,) * 4)
    before = clones(vectors)
    bssn_fast.normalize(weights, vectors, n_power_iterations=0)
    assert all(torch.equal(a, b) for x, y in zip(before, vectors, strict=True) for a, b in zip(x, y, strict=True))
    bssn_fast.normalize(weights, vectors, n_power_iterations=1)
    assert not any(
        torch.equal(a, b) for x, y in zip(before[:1], vectors, strict=False) for a, b in zip(x, y, strict=True)
    )


def test_weights_with_gaps_and_expanded_ones():
    whole = torch.randn(6, 10, 3, 3, dtype=torch.float64)
    _, vectors = arguments(((6, 4, 3, 3),), (0,))
    for weight in (whole[:, 3:7], whole[:, ::2][:, :4], torch.ones(1, 1, 1, 1).double().expand(6, 4, 3, 3)):
        leaf = weight.detach().requires_grad_()
        (found,), sigma = bssn_fast.normalize([leaf], clones(vectors), n_power_iterations=0)
        twin = weight.detach().clone().requires_grad_()
        expected, _, s = reference.normalize(twin, vectors[0], 0, scale=1, eps=1e-12, n_power_iterations=0)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(sigma[0], s)
        factor = torch.randn_like(expected)
        (a,) = torch.autograd.grad((found * factor).sum(), leaf)
        (b,) = torch.autograd.grad((expected * factor).sum(), twin)
        torch.testing.assert_close(a, b)


def test_no_graph_where_none_is_wanted():
    weights, vectors = arguments(SHAPES, (0,) * 4)
    weights[1].requires_grad_(False)
    normalized, sigma = bssn_fast.normalize(weights, vectors)
    assert [w.requires_grad for w in normalized] == [True, False, True, True]
    assert not sigma.requires_grad
    with torch.no_grad():
        normalized, _ = bssn_fast.normalize(weights, vectors)
    assert not any(w.requires_grad for w in normalized)


def test_the_same_weight_twice():
    weights, vectors = arguments(((3, 2, 2),), (0,))
    (a, b), _ = bssn_fast.normalize(weights * 2, vectors + clones(vectors), n_power_iterations=0)
    (a + 2 * b).sum().backward()
    found = weights[0].grad.clone()
    weights[0].grad = None
    (c,), _ = bssn_fast.normalize(weights, vectors, n_power_iterations=0)
    (3 * c).sum().backward()
    torch.testing.assert_close(found, weights[0].grad)


def freed(tensor):
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


W, V = torch.randn(4, 3), (torch.randn(4), torch.randn(3))
BAD_CALLS = {
    "no weights": (([], []), {}, ValueError, "no weights"),
    "numbers differ": (([W, W], [V]), {}, ValueError, "2 weights, 1"),
    "dims differ": (([W], [V]), {"dims": [0, 0]}, ValueError, "dims"),
    "dim": (([W], [V]), {"dims": 2}, ValueError, "from 0 to 1"),
    "three vectors": (([W], [(*V, V[0])]), {}, ValueError, r"vectors\[0\]"),
    "wrong sizes": (([W], [V[::-1]]), {}, ValueError, r"\(3,\).*\(4,\)"),
    "wrong size of the other dim": (([W], [V]), {"dims": 1}, ValueError, "dim 1"),
    "dtype of vectors": (([W], [tuple(v.double() for v in V)]), {}, TypeError, "float64"),
    "half vectors": (([W.half()], [tuple(v.half() for v in V)]), {}, TypeError, "float32"),
    "device of vectors": (([W], [tuple(v.to("meta") for v in V)]), {}, TypeError, "meta"),
    "strided vector": (([W], [(torch.randn(8)[::2], V[1])]), {}, ValueError, "contiguous"),
    "vector with gradient": (([W], [(V[0].clone().requires_grad_(), V[1])]), {}, ValueError, "gradient"),
    "mixed dtypes": (([W, W.double()], [V, tuple(v.double() for v in V)]), {}, TypeError, r"weights\[1\]"),
    "integer": (([W.int()], [V]), {}, TypeError, "int32"),
    "one dimension": (([W[0]], [V]), {}, ValueError, r"weights\[0\]"),
    "meta": (([W.to("meta")], [V]), {}, TypeError, "meta"),
    "scale": (([W], [V]), {"scale": -1}, ValueError, "scale"),
    "eps": (([W], [V]), {"eps": 0}, ValueError, "eps"),
    "iterations": (([W], [V]), {"n_power_iterations": -1}, ValueError, "n_power_iterations"),
    "result": (([W], [V]), {"dtype": torch.int8}, TypeError, "int8"),
    "no tensor": (([W.numpy()], [V]), {}, TypeError, r"weights\[0\].*ndarray"),
    "no vector": (([W], [(None, V[1])]), {}, TypeError, r"vectors\[0\].*NoneType"),
    "no dim": (([W], [V]), {"dims": ["0"]}, ValueError, "'0'"),
    "freed weight": (([freed(W)], [V]), {}, ValueError, r"memory of weights\[0\]"),
    "freed vector": (([W], [(freed(V[0]), V[1])]), {}, ValueError, r"vectors\[0\].*memory"),
    "freed gain": (([W], [V]), {"gains": [freed(V[0][:1])]}, ValueError, r"memory of gains\[0\]"),
    "negative bit": (([W], [(torch._neg_view(V[0]), V[1])]), {}, ValueError, r"vectors\[0\].*memory"),
    "vectors of two weights": (([W, W], [V, V]), {}, ValueError, r"vectors\[1\].*twice"),
    "backend": (([W], [V]), {"backend": "none"}, bssn_fast.BackendUnavailableError, "none"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments(name):
    positional, named, error, message = BAD_CALLS[name]
    before = [v.clone() for v in V]
    with pytest.raises(error, match=message):
        bssn_fast.normalize(*positional, **named)
    assert all(map(torch.equal, before, V))


def test_of_a_module_as_the_documentation_has_it():
    layer = nn.Conv2d(3, 4, 3)
    sizes = vector_sizes(layer.weight.shape, 0, True)
    vectors = [tuple(torch.randn(n) for n in sizes)]
    for _ in range(300):
        (weight,), sigma = bssn_fast.normalize([layer.weight], vectors)
    out = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
    inner = torch.linalg.matrix_norm(layer.weight.transpose(0, 1).flatten(1), 2)
    torch.testing.assert_close(sigma[0], ((out + inner) / 2).detach())
    torch.testing.assert_close(weight, layer.weight / sigma[0])


@pytest.mark.parametrize("backend", ["reference", ""])
def test_autocast_does_not_reach_the_arithmetic(backend):
    weights, vectors = arguments(SHAPES, (0, 1, 0, 1), dtype=torch.float32)

    def run():
        group = clones(vectors)
        normalized, sigma = bssn_fast.normalize(weights, group, dims=(0, 1, 0, 1), backend=backend)
        loss = sum(w.pow(3).sum() for w in normalized)
        first = torch.autograd.grad(loss, weights, create_graph=True)
        with torch.autocast("cpu", enabled=False):  # what torch differentiates itself is not ours
            second = torch.autograd.grad(sum(g.square().sum() for g in first), weights)
        return [*normalized, sigma, *(v for vs in group for v in vs), *first, *second]

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run()
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * len(found)


TRANSFORMS = {
    "grad": lambda f, w, c: torch.func.grad(lambda *x: f(*x).pow(3).sum(), (0, 1))(w, c),
    "jvp": lambda f, w, c: torch.func.jvp(f, (w, c), (w.cos(), c.cos()))[1],
    "vmap": lambda f, w, c: torch.func.vmap(f, (0, None))(torch.stack([w, w.sin()]), c),
    "hessian": lambda f, w, c: torch.func.hessian(lambda *x: f(*x).pow(3).sum())(w, c),
}


def with_gain(shape, vectors, n):
    def ours(weight, gain):
        (found,), _ = bssn_fast.normalize([weight], clones(vectors), gains=[gain], n_power_iterations=n)
        return found

    def plain(weight, gain):
        return reference.normalize(weight, vectors[0], 0, scale=gain, eps=1e-12, n_power_iterations=n)[0]

    weight = torch.randn(shape, dtype=torch.float64)
    return ours, plain, weight, torch.tensor([1.7], dtype=torch.float64)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("n", [0, 1])
def test_transforms(transform, n):
    _, vectors = arguments(((4, 3, 2),), (0,))
    ours, plain, *at = with_gain((4, 3, 2), vectors, n)
    if (transform, n) == ("vmap", 1):
        with pytest.raises(RuntimeError, match="n_power_iterations=0"):
            TRANSFORMS[transform](ours, *at)
        return
    found, expected = (TRANSFORMS[transform](f, *at) for f in (ours, plain))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("which", [0, 1])
def test_forward_mode_derivatives(which):
    _, vectors = arguments(((4, 3, 2),), (0,))
    *both, weight, gain = with_gain((4, 3, 2), vectors, 1)
    tangents = []
    for f in both:
        with forward_ad.dual_level():
            at = [weight, gain]
            at[which] = forward_ad.make_dual(at[which], at[which].cos())
            tangents.append(forward_ad.unpack_dual(f(*at)).tangent)
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vectors_stay_finite_with_any_eps(dtype):
    smallest = torch.finfo(dtype).tiny
    weight = torch.randn(6, 5, dtype=dtype) * smallest**0.52
    vectors = [tuple(reference.unit(torch.randn(n, dtype=dtype), 1e-12) for n in (6, 5))]
    bssn_fast.normalize([weight], vectors, eps=smallest**0.9)
    assert all(v.isfinite().all() for v in vectors[0])
    _, sigma = bssn_fast.normalize([torch.eye(6, 5, dtype=dtype)], vectors)
    torch.testing.assert_close(sigma, torch.ones(1, dtype=dtype))
