"""The definition itself, against matrices that torch.linalg decomposes and against torch's spectral norm."""

import pytest
import torch
from torch.autograd import forward_ad

from bssn_fast import reference
from bssn_fast.layout import needs_two_sides, vector_sizes


def start(weight, dim, both):
    return tuple(
        reference.unit(torch.randn(n, dtype=weight.dtype), 1e-12) for n in vector_sizes(weight.shape, dim, both)
    )


def output_side(weight, dim):
    """[c_out, c_in k], written with einsum."""
    w = weight.flatten(2) if weight.ndim > 2 else weight[..., None]
    return torch.einsum("oik->oik" if dim == 0 else "iok->oik", w).reshape(weight.shape[dim], -1)


def input_side(weight, dim):
    """[c_in, c_out k]."""
    return output_side(weight, 1 - dim)


SHAPES = [(6, 4, 3, 3), (5, 5, 2, 2), (7, 3), (1, 9), (1, 4, 3), (4, 1, 3), (3, 5, 2, 1, 2), (6, 4, 1, 1)]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_sigma_is_the_largest_singular_value(shape, dim):
    weight = torch.randn(shape, dtype=torch.float64)
    both = needs_two_sides(shape)
    normalized, vectors, sigma = reference.normalize(
        weight, start(weight, dim, both), dim, scale=1.5, eps=1e-12, n_power_iterations=2000
    )
    s_out = torch.linalg.matrix_norm(output_side(weight, dim), 2)
    s_in = torch.linalg.matrix_norm(input_side(weight, dim), 2)
    expected = (s_out + s_in) / 2 if both else s_out
    torch.testing.assert_close(sigma, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(normalized, 1.5 * weight / expected, rtol=1e-9, atol=0)
    for v in vectors:
        torch.testing.assert_close(v.norm(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize(("c_out", "c_in"), [(5, 5), (6, 3), (3, 6)])
@pytest.mark.parametrize("dim", [0, 1])
def test_one_dominant_input_direction(c_out, c_in, dim):
    """A rank-one dependence on the input channel, for which `weight.view(c_in, -1)` is a wrong matrix."""
    a = torch.zeros(c_in, dtype=torch.float64)
    a[1] = 1
    b = torch.rand(c_out, 3, 3, dtype=torch.float64)
    weight = torch.einsum("i,okl->oikl", a, b) + 1e-3 * torch.randn(c_out, c_in, 3, 3, dtype=torch.float64)
    if dim == 1:
        weight = weight.transpose(0, 1).contiguous()
    _, vectors, sigma = reference.normalize(
        weight, start(weight, dim, True), dim, scale=1, eps=1e-12, n_power_iterations=500
    )
    s_in, s_out = (torch.linalg.matrix_norm(m(weight, dim), 2) for m in (input_side, output_side))
    torch.testing.assert_close(sigma, (s_in + s_out) / 2, rtol=1e-10, atol=0)
    assert vectors[2].abs().argmax() == 1  # u_in points to the dominant channel
    wrong = torch.linalg.matrix_norm(weight.reshape(weight.shape[1 - dim], -1), 2) if dim == 0 else s_out
    assert abs(wrong - s_in) > 0.01 * s_in


def test_all_input_channels_equal():
    """s_in is sqrt(c_in) |b|, s_out less than that wherever b has more than one direction."""
    b = torch.randn(4, 9, dtype=torch.float64)
    weight = b[:, None, :].expand(4, 7, 9).reshape(4, 7, 3, 3)
    _, _, sigma = reference.normalize(weight, start(weight, 0, True), 0, scale=1, eps=1e-12, n_power_iterations=300)
    s_in, s_out = 7**0.5 * b.norm(), 7**0.5 * torch.linalg.matrix_norm(b, 2)
    torch.testing.assert_close(sigma, (s_in + s_out) / 2)
    assert s_in > 1.1 * s_out


@pytest.mark.parametrize("n", [1, 3])
def test_order_of_the_output_side_is_torchs(n):
    layer = torch.nn.Conv2d(3, 6, 3).double()
    torch.nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=n)
    norm, weight = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    before = norm._u.clone(), norm._v.clone()
    expected = layer.weight
    found, vectors, _ = reference.normalize(weight, before, 0, scale=1, eps=1e-12, n_power_iterations=n)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(vectors, (norm._u, norm._v), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_backward_is_the_derivative_of_forward(both, dim):
    weight = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    vectors = start(weight, dim, both)
    normalized, used, sigma = reference.normalize(weight, vectors, dim, scale=1.3, eps=1e-12, n_power_iterations=1)
    grad = torch.randn_like(weight)
    (expected,) = torch.autograd.grad(normalized, weight, grad)
    found = reference.normalize_backward(grad, weight.detach(), used, sigma.detach(), dim, 1.3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("both", [False, True])
def test_special_weights(bad, both):
    weight = torch.randn(4, 3, 2, 2)
    vectors = start(weight, 0, both)
    normalized, after, sigma = reference.normalize(
        torch.full_like(weight, bad), vectors, 0, scale=2, eps=1e-12, n_power_iterations=2
    )
    assert all(map(torch.equal, vectors, after))
    if bad == 0:
        assert sigma == 0
        assert not normalized.any()
        assert not reference.normalize_backward(weight, torch.zeros_like(weight), after, sigma, 0, 2).any()
    else:
        assert sigma.isnan()
        assert normalized.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_compute_in_float32(dtype):
    weight = torch.randn(4, 3, 3, 3).to(dtype)
    vectors = start(weight.float(), 0, True)
    normalized, after, sigma = reference.normalize(weight, vectors, 0, scale=1, eps=1e-12, n_power_iterations=1)
    full, _, sigma_full = reference.normalize(weight.float(), vectors, 0, scale=1, eps=1e-12, n_power_iterations=1)
    assert normalized.dtype == dtype
    assert sigma.dtype == after[0].dtype == torch.float32
    assert torch.equal(normalized, full.to(dtype))
    assert torch.equal(sigma, sigma_full)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_power_iterations", [0, 1])
@pytest.mark.parametrize("shape", [(2**20, 1), (1, 2**20), (2**19, 2), (2**17, 2, 3), (3, 2**17, 2)])
def test_long_sums_keep_their_digits(shape, n_power_iterations, dtype):
    """One running sum in fp32 over as many numbers is off by 1e-4 and more."""
    weight = torch.randn(shape).to(dtype)
    both = needs_two_sides(shape)
    for dim in (0, 1):
        vectors = start(weight.double(), dim, both)
        if n_power_iterations == 0:
            vectors = reference.power_iteration(weight.double(), vectors, dim, 1e-12)
        single = tuple(v.float() for v in vectors)
        settings = {"scale": 1, "eps": 1e-12, "n_power_iterations": n_power_iterations}
        _, found_vectors, found = reference.normalize(weight, single, dim, **settings)
        exact_start = tuple(v.double() for v in single)
        _, exact_vectors, exact = reference.normalize(weight.double(), exact_start, dim, **settings)
        assert abs(float(found) / float(exact) - 1) < 5e-6
        for v, w in zip(found_vectors, exact_vectors, strict=True):
            assert float((v.double() - w).norm()) < 1e-5


@pytest.mark.parametrize("longest", [1, 5, 2**12])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_sums_in_parts_are_the_same_function(monkeypatch, both, dim, longest):
    """Values, both derivatives, forward mode, and under vmap, however short the parts are."""
    weight = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    vectors = start(weight, dim, both)

    def normalize(w):
        return reference.normalize(w, vectors, dim, scale=1.3, eps=1e-12, n_power_iterations=0)[0]

    expected = normalize(weight)
    monkeypatch.setattr(reference, "LONGEST_SUM", longest)
    torch.testing.assert_close(normalize(weight), expected, rtol=1e-13, atol=1e-14)
    assert torch.autograd.gradcheck(normalize, weight, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(normalize, weight)
    several = torch.randn(3, *weight.shape, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(normalize)(several), torch.stack([normalize(w) for w in several]))


@pytest.mark.parametrize("both", [False, True])
def test_forward_mode_holds_the_vectors_constant_as_backward_does(both):
    weight, tangent = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    vectors = start(weight, 0, both)

    def normalize(w):
        return reference.normalize(w, vectors, 0, scale=1.3, eps=1e-12, n_power_iterations=2)[0]

    by_rows = torch.autograd.functional.jacobian(normalize, weight).flatten(0, 3).flatten(1)
    expected = (by_rows @ tangent.flatten()).view_as(weight)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(normalize(forward_ad.make_dual(weight, tangent))).tangent
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.func.jvp(normalize, (weight,), (tangent,))[1], expected, rtol=1e-11, atol=1e-12)
