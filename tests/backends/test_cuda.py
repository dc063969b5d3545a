"""The CUDA kernels' arithmetic without a GPU, block after block on the CPU: every layout, dtype and kind of tile."""

import cuda_emulated
import matrix
import pytest
import torch
from cuda_emulated import H200, T4, TINY
from hypothesis import given
from hypothesis import strategies as st
from matrix import CASES, Case

from bssn_fast import backends, normalize
from bssn_fast.backends import extension

if cuda_emulated.compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

GPUS = {"h200": H200, "t4": T4, "tiny": TINY}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_reference(gpu, case):
    matrix.check("cuda", case)


@pytest.mark.parametrize("limits", [T4, TINY], ids=["t4", "tiny"])
@pytest.mark.parametrize("memory", matrix.MEMORY[:3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_gpus(gpu, limits, memory, dtype):
    gpu(limits)
    matrix.check("cuda", Case(weight_dtype=dtype, result_dtype=dtype, memory=memory))


@pytest.mark.parametrize("memory", matrix.MEMORY[:3])
@pytest.mark.parametrize("n_power_iterations", [0, 1, 2])
def test_one_launch_for_each_phase(gpu, monkeypatch, memory, n_power_iterations):
    case = Case(memory=memory, n_power_iterations=n_power_iterations)
    single = matrix.run("cuda", case, matrix.inputs(case))
    monkeypatch.setenv("BSSN_FAST_CUDA_LAUNCH", "phases")
    phases = matrix.check("cuda", case)
    assert all(matrix.same_bits(a, b) for a, b in zip(single.normalized, phases.normalized, strict=True))


def test_last_tile_of_short_rows(gpu):
    """Of 128 rows, behind one of 129: more threads share a row of it."""
    gpu(cuda_emulated.Gpu(1, 99 * 1024))
    matrix.check("cuda", Case(shapes=((257, 51),), dims=(0,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slack_bound_needs_no_look_at_the_weight_in_backward(gpu, dtype):
    matrix.check_slack("cuda", dtype)


def test_unknown_way_of_launching(gpu, monkeypatch):
    monkeypatch.setenv("BSSN_FAST_CUDA_LAUNCH", "twice")
    with pytest.raises(ValueError, match="BSSN_FAST_CUDA_LAUNCH"):
        matrix.run("cuda", Case(), matrix.inputs(Case()))


@pytest.mark.parametrize("memory", matrix.MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_weights_and_gradients(gpu, memory, dtype, offset):
    matrix.check("cuda", Case(weight_dtype=dtype, result_dtype=dtype, memory=memory, offset=offset))


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1])
def test_rows_of_many_elements(gpu, memory, dtype, offset):
    """With as many packs for a thread as it can be given, of which those of v_out do not all lie in registers."""
    shapes = ((3, 1536, 3, 3), (2, 1400, 3, 3), (3, 1000, 3, 3), (2, 3, 4096), (5, 14000), (40, 256, 3, 3))
    types = {"weight_dtype": dtype, "result_dtype": dtype}
    matrix.check("cuda", Case(shapes=shapes, dims=(0,) * 6, memory=memory, offset=offset, **types))


@pytest.mark.parametrize("limits", [H200, TINY], ids=["h200", "tiny"])
@pytest.mark.parametrize("memory", matrix.MEMORY[:3])
@pytest.mark.parametrize(
    "types", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("both", [True, False])
def test_gradients_written_by_rows(gpu, limits, memory, types, both):
    """One tile and several beside and below each other, the last of them narrower and of few rows; all kernel sizes."""
    gpu(limits)
    shapes = (
        (4, 8),
        (70, 12, 3, 3),
        (37, 400, 3, 3),
        (41, 260, 2, 2),
        (130, 36, 4, 4),
        (90, 20, 5, 5),
        (33, 1028, 1, 1),
    )
    matrix.check("cuda", Case(shapes=shapes, memory=memory, weight_dtype=types[0], result_dtype=types[1], both=both))


@pytest.mark.parametrize(
    "shape", [(1, 64, 1, 1), (2, 64), (2, 2048), (2, 8192), (3, 8000), (64, 64), (2, 4_600_000, 2)]
)
def test_two_directions_of_any_shape(gpu, shape):
    """`apply` asks for one direction where there is one kernel position; others may ask for both."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    sizes = (shape[0], weight[0].numel(), shape[1], weight[:, 0].numel())
    vectors = [torch.nn.functional.normalize(torch.randn(size), dim=0) for size in sizes]
    found, expected = [v.clone() for v in vectors], [v.clone() for v in vectors]
    _, sigma = normalize([weight], [found], backend="cuda")
    _, expected_sigma = normalize([weight], [expected], backend="reference")
    torch.testing.assert_close(sigma, expected_sigma, rtol=1e-5 if weight.numel() < 1_000_000 else 2e-4, atol=0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_what_the_kernels_do_not_address_is_left_to_triton_where_it_works(gpu, monkeypatch):
    called = []
    triton = backends._module("triton")
    for operation in ("forward", "backward"):
        monkeypatch.setattr(triton, operation, lambda *args, name=operation: called.append(name))
    monkeypatch.setattr(triton, "DEVICES", ("cpu",))
    monkeypatch.setattr(triton, "why_unavailable", lambda device: None)
    x = matrix.in_dtype(matrix.inputs(Case()), torch.float64)
    matrix.run("cuda", Case(), x, torch.float64)
    assert called == ["forward", "backward"]


@pytest.mark.parametrize("layers", [(0,), (5, 2), (17, 0, 3)])
def test_gradients_of_some_layers(gpu, layers):
    matrix.check("cuda", Case(layers=layers))


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("both", [True, False])
def test_kernels_of_many_positions(gpu, memory, both):
    """Fewer, as many and more positions than a block has threads."""
    shapes = ((3, 4, 255), (3, 4, 256), (5, 3, 257), (4, 3, 30, 20), (2, 60, 127), (2, 300, 128))
    matrix.check("cuda", Case(shapes=shapes, memory=memory, both=both))


@pytest.mark.parametrize("limits", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "transposed"])
def test_layers_of_many_tiles(gpu, limits, memory):
    gpu(limits)
    matrix.check("cuda", Case(shapes=((200, 70, 3, 3), (700, 100), (2, 9000), (5001, 3)), memory=memory))


@pytest.mark.parametrize(
    ("bad", "everywhere"), [(0.0, True), (float("nan"), True), (float("nan"), False), (float("-inf"), False)]
)
@pytest.mark.parametrize("n_power_iterations", [0, 2])
@pytest.mark.parametrize("memory", ["contiguous", "transposed"])
def test_zero_and_non_finite_weights(gpu, memory, bad, everywhere, n_power_iterations):
    """As the reference has it: 0 gives 0, all else NaN; no vector changes; other layers of the call are not touched."""
    case = Case(shapes=((6, 5, 3, 3), (4, 3, 3, 3), (7, 9)), memory=memory, n_power_iterations=n_power_iterations)
    x = matrix.inputs(case)
    untouched = matrix.run("cuda", case, x)
    for j in (0, 2):
        (x.weights[j] if everywhere else x.weights[j][1, 2]).fill_(bad)
    found, expected = matrix.run("cuda", case, x), matrix.run("reference", case, x)
    for j in (0, 2):
        assert matrix.same_bits(found.sigma[j].isnan(), expected.sigma[j].isnan())
        assert matrix.same_bits(found.normalized[j].isnan(), expected.normalized[j].isnan())
        assert bad != 0 or (found.sigma[j] == 0 and not found.normalized[j].any() and not found.grad_weights[j].any())
    changed = [*found.vectors[:4], *found.vectors[8:]]
    before = [*x.vectors[:4], *x.vectors[8:]]
    assert all(matrix.same_bits(a, b) for a, b in zip(changed, before, strict=True))
    assert matrix.same_bits(found.normalized[1], untouched.normalized[1])


@pytest.mark.parametrize("magnitude", [1e-15, 1e-6, 1e6, 1e15])
def test_small_and_large_weights(gpu, magnitude):
    """eps is small enough not to matter: the sums of squares, of the order of |W|^4, must not be lost."""
    matrix.check("cuda", Case(magnitude=magnitude, eps=1e-30))


def test_weights_smaller_than_eps(gpu):
    matrix.check("cuda", Case(magnitude=1e-4, eps=1e-3))


@pytest.mark.parametrize("memory", ["contiguous", "transposed"])
def test_threads_in_another_order_change_no_bit(gpu, memory):
    """They would, were a barrier missing between writing and reading in shared or global memory."""
    shapes = (*matrix.SHAPES, (200, 70, 3, 3))
    case = Case(shapes=shapes, memory=memory, n_power_iterations=2)
    for limits in GPUS.values():
        gpu(limits)
        one = matrix.run("cuda", case, matrix.inputs(case))
        with cuda_emulated.last_thread_first():
            other = matrix.run("cuda", case, matrix.inputs(case))
        matrix.assert_same(one, other)


def test_more_layers_than_arguments_hold_are_one_launch(gpu):
    """Layers are described in a table in the workspace, which takes several writes."""
    shapes = tuple((2 + j % 5, 1 + j % 3, 1 + j % 2) for j in range(1003))
    before = cuda_emulated.library().count_launches()
    matrix.check("cuda", Case(shapes=shapes))
    assert cuda_emulated.library().count_launches() - before == 2  # forward and backward


def test_errors_are_raised_in_cudas_words(gpu):
    class Broken:
        def cuda_forward_workspace(self, *arguments):
            return 1024

        def cuda_forward(self, *arguments):
            return 700

        def cuda_error_string(self, error):
            return {700: "an illegal memory access was encountered"}[error]

    gpu(Broken())
    with pytest.raises(RuntimeError, match=r"18 weights on cpu failed.*illegal memory access.*700"):
        matrix.run("cuda", Case(), matrix.inputs(Case()))


@given(st.integers(0, 2**31 - 1), st.integers(1, 2**31 - 1))
def test_division_by_multiplication(x, divisor):
    assert cuda_emulated.library().divide(x, divisor) == x // divisor
    multiple = x // divisor * divisor
    for near in (multiple - 1, multiple):
        if near >= 0:
            assert cuda_emulated.library().divide(near, divisor) == near // divisor


def test_extension_built_without_cuda_says_so(monkeypatch):
    monkeypatch.setattr(extension, "module", object())
    monkeypatch.setattr(extension, "not_built", {"cuda": "nvcc was not found; install the CUDA toolkit"})
    backends.forget()
    with pytest.raises(backends.BackendUnavailableError, match="built without CUDA: nvcc was not found"):
        backends.get("cuda", torch.device("cuda"))
    backends.forget()
