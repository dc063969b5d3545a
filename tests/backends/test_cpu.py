"""The C++ kernels: every instruction set that this processor has, every layout, dtype and number of iterations."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from array import array
from concurrent.futures import ThreadPoolExecutor

import matrix
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrix import CASES, Case

from bssn_fast import ops
from bssn_fast.backends import cpu, extension
from bssn_fast.laws import CONSTANT, Law, Laws
from bssn_fast.layout import Batch

LAW = Laws.of([Law(CONSTANT, 1.3)])

if extension.module is None:
    pytest.skip(str(extension.why_missing()), allow_module_level=True)

NATIVE = extension.module.cpu_instruction_set()
INSTRUCTION_SETS = [s for s in ("avx512", "avx2", "portable") if extension.module.cpu_set_instruction_set(s)]
extension.module.cpu_set_instruction_set(NATIVE)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    assert extension.module.cpu_set_instruction_set(request.param)
    assert extension.module.cpu_instruction_set() == request.param
    yield request.param
    extension.module.cpu_set_instruction_set(NATIVE)


@pytest.fixture
def threads():
    """Sets the number of threads; as it was afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_reference(instruction_set, case):
    matrix.check("cpu", case)


@pytest.mark.parametrize("memory", matrix.MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_weights_and_gradients(instruction_set, memory, dtype, offset):
    matrix.check("cpu", Case(weight_dtype=dtype, result_dtype=dtype, memory=memory, offset=offset))


@pytest.mark.parametrize("layers", [(0,), (5, 2), (17, 0, 3)])
def test_gradients_of_some_layers(layers):
    matrix.check("cpu", Case(layers=layers))


KERNELS = [
    (1, 2),
    (5,),
    (2, 3),
    (7,),
    (2, 2, 2),
    (3, 3),
    (10,),
    (11,),
    (4, 4),
    (17,),
    (5, 5),
    (31,),
    (33,),
    (7, 7),
    (8, 8),
]


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: "x".join(map(str, k)))
def test_every_period_of_kernel_positions_and_lanes(instruction_set, kernel, memory):
    shapes = tuple((c_out, c_in, *kernel) for c_out, c_in in ((1, 1), (3, 2), (4, 7), (6, 16), (9, 33)))
    matrix.check("cpu", Case(shapes=shapes, memory=memory))
    matrix.check("cpu", Case(shapes=shapes, memory=memory, weight_dtype=torch.float64, result_dtype=torch.float64))


@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("both", [True, False])
def test_layers_of_many_tiles(threads, memory, dtype, both):
    threads(2)
    shapes = ((130, 150, 3, 3), (700, 300), (70, 130, 4, 4), (30, 3000), (3000, 90), (20001, 3))
    matrix.check("cpu", Case(shapes=shapes, weight_dtype=dtype, result_dtype=dtype, memory=memory, both=both))


LONG_ROWS = (
    (3, 33000),
    (9, 4000, 3, 3),
    (1, 3, 190, 180),
    (5, 2, 1100),
    (33000, 2),
    (66, 2, 1025),
    (2, 17000, 2),
    (6, 5, 3),
)
"""Rows that are read in pieces: of whole channels, of channels of one kernel position, of positions of one channel."""


@pytest.mark.parametrize("memory", matrix.MEMORY)
@pytest.mark.parametrize(
    ("dtypes", "both", "n_power_iterations"),
    [
        (matrix.DTYPES[0], True, 1),
        (matrix.DTYPES[0], False, 0),
        (matrix.DTYPES[1], True, 0),
        (matrix.DTYPES[2], True, 1),
        ((torch.bfloat16, torch.float64), False, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("dim", [0, 1])
def test_long_rows(memory, dtypes, both, n_power_iterations, dim):
    matrix.check(
        "cpu",
        Case(
            shapes=LONG_ROWS, dims=(dim,) * len(LONG_ROWS), weight_dtype=dtypes[0], result_dtype=dtypes[1],
            memory=memory, both=both, n_power_iterations=n_power_iterations,
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("c_out", "c_in", "k"),
    [(1, 10**8, 1), (4, 10**8, 1), (128, 10**8, 9), (3, 2, 10**8), (2, 64, 10**7), (10**8, 3, 1)],
)
@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("weight_type", range(4))
@pytest.mark.parametrize("backward", [False, True])
def test_memory_to_work_in_is_bounded(c_out, c_in, k, order, weight_type, backward):
    """Sums of a few rows for each tile of 64, and besides some megabytes for each thread."""
    geometry = array("q", [c_out, c_in, k, k > 1, order, c_in * k, k, 0, 0, 0, 0, 0])
    number = 8 if weight_type == 1 else 4
    tiles = -(-c_out // 64)
    sums = number * (3 * tiles * c_in * k + 2 * c_out * k) + c_out * c_in * k // 2**14
    for threads in (1, 64):
        needed = extension.module.cpu_workspace(geometry.buffer_info()[0], 1, weight_type, threads, backward)
        assert needed < sums + threads * 12 * 2**20 + 2**20


@pytest.mark.parametrize("memory", matrix.MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_of_threads_does_not_change_a_bit(threads, memory, dtype):
    case = Case(
        shapes=((300, 150, 3, 3), *matrix.SHAPES, (700, 300), *LONG_ROWS), weight_dtype=dtype, result_dtype=dtype,
        memory=memory, n_power_iterations=2,
    )  # fmt: skip
    x = matrix.inputs(case)
    threads(1)
    one = matrix.run("cpu", case, x)
    for n in (2, 3, 7):
        threads(n)
        many = matrix.run("cpu", case, x)
        for part in dataclasses.fields(matrix.Results):
            for a, b in zip(getattr(one, part.name), getattr(many, part.name), strict=True):
                assert torch.equal(a, b), (n, part.name)


def test_threads_of_its_own_without_openmp(threads):
    case = Case(shapes=((300, 150, 3, 3), (64, 3, 3, 3)))
    expected = matrix.run("cpu", case, matrix.inputs(case))
    threads(4)
    extension.module.cpu_set_openmp(0)
    try:
        found = matrix.check("cpu", case)
    finally:
        extension.module.cpu_set_openmp(cpu._gomp_parallel())
    assert all(torch.equal(a, b) for a, b in zip(found.normalized, expected.normalized, strict=True))


@pytest.mark.parametrize(
    ("bad", "everywhere"), [(0.0, True), (float("nan"), True), (float("nan"), False), (float("-inf"), False)]
)
@pytest.mark.parametrize("n_power_iterations", [0, 2])
@pytest.mark.parametrize("memory", matrix.MEMORY)
def test_zero_and_non_finite_weights(instruction_set, memory, bad, everywhere, n_power_iterations):
    """As the reference has it: 0 gives 0, all else NaN; no vector changes; other layers of the call are not touched."""
    case = Case(shapes=((6, 5, 3, 3), (4, 3, 3, 3), (7, 9)), memory=memory, n_power_iterations=n_power_iterations)
    x = matrix.inputs(case)
    untouched = matrix.run("cpu", case, x)
    for j in (0, 2):
        (x.weights[j] if everywhere else x.weights[j][1, 2]).fill_(bad)
    found, expected = matrix.run("cpu", case, x), matrix.run("reference", case, x)
    for j in (0, 2):
        special = torch.zeros(()) if bad == 0 else torch.tensor(torch.nan)
        for results in (found, expected):
            for tensor in (results.normalized[j], results.sigma[j], results.grad_weights[j]):
                assert matrix.same_bits(tensor.abs(), special.expand(tensor.shape))
    layer_of_vector = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    for j, old, new in zip(layer_of_vector, x.vectors, found.vectors, strict=True):
        assert torch.equal(old, new) == (j != 1 or n_power_iterations == 0)
    assert torch.equal(found.normalized[1], untouched.normalized[1])
    assert torch.equal(found.grad_weights[1], untouched.grad_weights[1])


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_next_finite_weight_after_a_bad_one(instruction_set, bad):
    case = Case(shapes=((6, 5, 3, 3), (7, 9)))
    x = matrix.inputs(case)
    bad_x = matrix.Inputs([torch.full_like(w, bad) for w in x.weights], x.vectors, x.grads)
    after = matrix.run("cpu", case, bad_x).vectors
    found, expected = matrix.run("cpu", case, dataclasses.replace(x, vectors=after)), matrix.run("cpu", case, x)
    assert all(map(torch.equal, found.sigma, expected.sigma))


def test_results_larger_than_the_caches(threads):
    """They are written past the caches: a path of its own, also in the aligned middle and the ends of a buffer."""
    columns = extension.module.cpu_last_level_cache() // 8 // 512 // 9 + 10
    shape = (512, columns, 3, 3)
    weight, grad, out = (torch.randn(shape) for _ in range(3))
    vectors = [torch.nn.functional.normalize(torch.randn(n), dim=0) for n in (512, columns * 9, columns, 512 * 9)]
    snapshot, sigma = torch.empty(512 * 10 + columns * 10 + 16), torch.empty(1)
    batch = Batch.of([weight], [0], [True])
    ops.normalize(batch, [weight], vectors, LAW, 1e-12, 1, [out], snapshot, sigma, "cpu")
    torch.testing.assert_close(out, weight * (1.3 / sigma), rtol=3e-7, atol=0)
    room = torch.empty(grad.numel() + 3)
    result = room[3:].view(shape)
    ops.normalize_backward(
        batch, [grad], [weight], [0], Laws.of([Law(CONSTANT, 1.3)]), snapshot, sigma, [result], None, "cpu"
    )
    ratio = (grad.flatten().double() @ weight.flatten().double() / sigma.double()).float()
    u_out, v_out, u_in, v_in = vectors
    direction = (
        torch.outer(u_out, v_out).view(shape).add_(torch.outer(v_in, u_in).view(512, 3, 3, columns).permute(0, 3, 1, 2))
    )
    expected = grad.sub_(direction.mul_(ratio / 2)).mul_(1.3 / sigma)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=float(1e-6 * 1.3 / sigma))


def in_child(check):
    """Run a check in a forked child; True if it returned True within a minute."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this system does not tell a process's threads")
def test_forked_child_works_alone(threads):
    """torch's own parallel operations hang in such a child; ours does not need their threads."""
    threads(2)
    weight, out = torch.randn(300, 150, 3, 3), torch.empty(300, 150, 3, 3)
    first = [torch.nn.functional.normalize(torch.randn(n), dim=0) for n in (300, 1350, 150, 2700)]
    vectors = [v.clone() for v in first]
    batch, snapshot, sigma = Batch.of([weight], [0], [True]), torch.empty(4504), torch.empty(1)

    def normalize():
        for v, old in zip(vectors, first, strict=True):
            v.copy_(old)
        ops.normalize(batch, [weight], vectors, LAW, 1e-12, 1, [out], snapshot, sigma, "cpu")

    normalize()  # the parent's threads exist now
    expected = out.clone()
    out.zero_()

    def check():
        normalize()
        alone = len(os.listdir("/proc/self/task")) == 1
        torch.set_num_threads(1)
        return alone and torch.equal(out, expected)

    assert in_child(check)
    normalize()
    assert torch.equal(out, expected)  # and the parent still works


def test_several_python_threads_at_once():
    cases = [Case(shapes=((100, 50, 3, 3), (30, 20)), seed=seed) for seed in range(4)]
    expected = [matrix.run("cpu", case, matrix.inputs(case)) for case in cases]

    def repeat(case):
        return [matrix.run("cpu", case, matrix.inputs(case)).normalized[0] for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        for found, one in zip(pool.map(repeat, cases), expected, strict=True):
            assert all(torch.equal(f, one.normalized[0]) for f in found)


@pytest.mark.parametrize("bits", [torch.float16, torch.bfloat16], ids=str)
def test_conversion_of_every_16_bit_number(instruction_set, bits):
    """Written by the kernels as torch rounds it, read as torch reads it, for all numbers and what lies between."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(bits)
    finite = every[every.isfinite()].float().sort().values
    between = (finite[1:].double() + finite[:-1].double()).div(2).float()  # ties
    values = torch.cat([finite, between, torch.nextafter(between, finite[1:]), torch.nextafter(between, finite[:-1])])
    u, v = torch.zeros(1), torch.zeros(len(values))
    u[0] = v[0] = 1
    # sigma = u W v is then this very number, and the factor 1
    out, snapshot, sigma = torch.empty(1, len(values), dtype=bits), torch.empty(4 + len(values) + 3), torch.empty(1)
    ops.normalize(
        Batch.of([values[None]], [0], [False]),
        [values[None]],
        [u, v],
        Laws.of([Law(CONSTANT, float(values[0]))]),
        1e-12,
        0,
        [out],
        snapshot,
        sigma,
        "cpu",
    )
    assert float(sigma) == float(values[0])
    assert matrix.same_bits(out[0], values.to(bits))

    back = torch.empty(1, len(finite))
    ops.normalize(
        Batch.of([finite[None]], [0], [False]),
        [finite[None].to(bits)],
        [u, v[: len(finite)].clone()],
        Laws.of([Law(CONSTANT, float(values[0]))]),
        1e-12,
        0,
        [back],
        snapshot,
        sigma,
        "cpu",
    )
    assert matrix.same_bits(back[0], finite)


shapes = st.builds(
    lambda c, k: (*c, *k),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.lists(st.integers(1, 6), max_size=3).map(tuple),
)


@given(
    shapes=st.lists(shapes, min_size=1, max_size=5).map(tuple),
    dtypes=st.sampled_from(matrix.DTYPES),
    memory=st.sampled_from(matrix.MEMORY),
    both=st.booleans(),
    n_power_iterations=st.integers(0, 3),
    dim=st.integers(0, 1),
    offset=st.integers(0, 5),
    magnitude=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_any_geometry(shapes, dtypes, memory, both, n_power_iterations, dim, offset, magnitude, seed):
    if dtypes[0] == torch.float16 or dtypes[1] == torch.float16:
        magnitude = 1.0
    case = Case(
        shapes=shapes, weight_dtype=dtypes[0], result_dtype=dtypes[1], memory=memory, both=both,
        n_power_iterations=n_power_iterations, dims=(dim,) * len(shapes), offset=offset, magnitude=magnitude, seed=seed,
    )  # fmt: skip
    matrix.check("cpu", case)


def test_missing_extension_is_explained():
    code = (
        "import sys; sys.modules['bssn_fast._C'] = None\n"
        "import torch, bssn_fast\n"
        "assert torch.isfinite(bssn_fast.apply(torch.nn.Linear(3, 2))(torch.ones(1, 3))).all()\n"
        "bssn_fast.apply(torch.nn.Linear(3, 2), backend='cpu')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "BSSN_FAST_BACKEND"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "BackendUnavailableError" in run.stderr
    assert "the C++ extension" in run.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_slack_bound_needs_no_look_at_the_weight_in_backward(dtype):
    matrix.check_slack("cpu", dtype)
