"""Graphs, streams, threads and devices: what a call may not depend on."""

from concurrent.futures import ThreadPoolExecutor

import matrix
import pytest
import torch
from matrix import Case

from bssn_fast import ops
from bssn_fast.laws import Laws
from bssn_fast.layout import Batch

CASE = Case(shapes=((64, 3, 3, 3), (128, 64, 3, 3), (96, 128, 1, 1), (1, 2048)), dims=(0, 0, 0, 0))


class Call:
    """Forward and backward of CASE in tensors of their own."""

    def __init__(self, backend, seed=0, device="cuda", repeat=1):
        case = Case(shapes=CASE.shapes * repeat, dims=CASE.dims * repeat, seed=seed)
        self.backend, self.case, self.x = backend, case, matrix.inputs(case, device)
        self.batch = Batch.of(self.x.weights, case.dim_list, case.two_sided)
        self.laws = Laws.of(case.law_list)
        self.normalized = [torch.empty_like(w) for w in self.x.weights]
        self.grad_weights = [torch.empty_like(w) for w in self.x.weights]
        self.snapshot = torch.empty(self.batch.snapshot_size, device=device)
        self.sigma = torch.empty(len(case.shapes), device=device)

    def forward(self):
        c, x = self.case, self.x
        ops.normalize(
            self.batch, x.weights, x.vectors, self.laws, c.eps, 1, self.normalized, self.snapshot, self.sigma,
            self.backend,
        )  # fmt: skip

    def backward(self):
        c, x = self.case, self.x
        ops.normalize_backward(
            self.batch, x.grads, x.weights, c.layer_list, self.laws, self.snapshot, self.sigma, self.grad_weights,
            None, self.backend,
        )  # fmt: skip

    def both(self):
        self.forward()
        self.backward()

    def tensors(self):
        return [*self.normalized, *self.grad_weights, *self.x.vectors, self.sigma]

    def poison(self):
        for t in (*self.normalized, *self.grad_weights, self.sigma, self.snapshot):
            t.fill_(torch.nan)


def assert_equal(a, b):
    for x, y in zip(a.tensors(), b.tensors(), strict=True):
        assert torch.equal(x.cpu(), y.cpu())


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_graph(backend, warm):
    """A hundred replays are a hundred calls, and eager calls between them disturb nothing."""
    captured, eager, other = Call(backend), Call(backend), Call(backend, seed=1)
    other.both()  # compiles
    if warm:
        captured.both()
        eager.both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.both()
    captured.poison()
    for n in range(100):
        graph.replay()
        eager.both()
        if n % 10 == 0:
            other.both()
    torch.cuda.synchronize()
    assert_equal(eager, captured)


def test_graphs_outlive_what_was_kept(backend):
    """Many other calls, whose programs push those of the captured call out of any cache."""
    captured, eager = Call(backend), Call(backend)
    for call in (captured, eager):
        call.both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.both()
    others = [Call(backend, seed) for seed in range(80)]
    for call in others:
        call.both()
    noise = [torch.full((1 << 16,), 7, dtype=torch.int64, device="cuda") for _ in range(50)]
    graph.replay()
    eager.both()
    torch.cuda.synchronize()
    assert all((x == 7).all() for x in noise)
    assert_equal(eager, captured)


def test_two_streams(backend):
    expected = [Call(backend, seed) for seed in (1, 2)]
    found = [Call(backend, seed) for seed in (1, 2)]
    for call in expected:
        for _ in range(50):
            call.both()
    streams = [torch.cuda.Stream() for _ in found]
    torch.cuda.synchronize()
    for _ in range(50):
        for call, stream in zip(found, streams, strict=True):
            with torch.cuda.stream(stream):
                call.both()
    torch.cuda.synchronize()
    for a, b in zip(expected, found, strict=True):
        assert_equal(a, b)


def test_many_launches(backend):
    """10,000 in a row, without waiting for any: none hangs, and the last is as right as the first."""
    call = Call(backend)
    for _ in range(5000):
        call.both()
    torch.cuda.synchronize()
    for weight, sigma in zip(call.x.weights, call.sigma.tolist(), strict=True):
        w = weight.double().cpu()
        out_side = torch.linalg.matrix_norm(w.flatten(1), 2)
        in_side = torch.linalg.matrix_norm(w.transpose(0, 1).flatten(1), 2)
        expected = (out_side + in_side) / 2 if w.ndim > 2 and w.shape[2] > 1 else out_side
        assert sigma == pytest.approx(float(expected), rel=1e-4)


def test_nothing_waits_for_the_device(backend, no_synchronization):
    call = Call(backend)
    with no_synchronization():
        call.both()
        call.both()


def assert_each_ends_as_alone(calls, alone, times):
    for call in alone:
        for _ in range(times):
            call.both()
    torch.cuda.synchronize()
    for a, b in zip(calls, alone, strict=True):
        assert_equal(a, b)


def test_many_launches_on_two_streams_at_once(backend):
    """10,000 in all, without waiting for any: each stream ends where the same calls alone end."""
    calls, alone = (
        [Call(backend, seed, repeat=3) for seed in (1, 2)],
        [Call(backend, seed, repeat=3) for seed in (1, 2)],
    )
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(2500):
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                call.both()
    torch.cuda.synchronize()
    assert_each_ends_as_alone(calls, alone, 2500)


def test_two_threads(backend):
    """Each with a stream of its own, as autograd's threads have."""
    calls, alone = ([Call(backend, seed) for seed in (1, 2)] for _ in range(2))
    torch.cuda.synchronize()

    def work(call):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(200):
                call.both()

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(work, calls))
    assert_each_ends_as_alone(calls, alone, 200)


def test_default_stream_of_another_device(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU: nothing to confuse")
    here, there = Call(backend, device="cuda:0"), Call(backend, device="cuda:1")
    with torch.cuda.device(0):
        for _ in range(3):
            here.both()
            there.both()
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    assert_equal(here, there)


def work_of(run):
    """Numbers of kernels, and of copies and fills, that a call sends to the GPU."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    others = sum(name.startswith(("Memset", "Memcpy")) for name in names)
    return len(names) - others, others


@pytest.mark.parametrize("repeat", [1, 10])
def test_number_of_launches(way, repeat):
    """One each way, whatever the number of layers, or one for each phase; CUDA C++ clears its counters, if any."""
    call = Call(way[0], repeat=repeat)
    kernels = {"phases": (3, 2)}.get(way[1], (1, 1))
    fills = 1 if way[0] == "cuda" else 0
    has_clusters = way[1] == "clusters" and torch.cuda.get_device_capability() >= (9, 0)  # of all of these small layers
    assert work_of(call.forward) == (kernels[0], 0 if has_clusters else fills)
    assert work_of(call.backward) == (kernels[1], fills)
