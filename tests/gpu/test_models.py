"""Whole models on a GPU: what users call, in autograd's threads, under autocast, in all memory formats."""

import copy

import pytest
import torch
from support import Net, images, norms, vectors_of
from torch import nn

import bssn_fast


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """The layers around ours compute as they do on the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def steps(model, x, n=3):
    """A few steps of training; the model's outputs, and its parameters in the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    outputs = []
    for _ in range(n):
        optimizer.zero_grad()
        out = model(x)
        (out.square().mean() + model(x.flip(0)).mean()).backward()  # two forwards before one backward
        optimizer.step()
        outputs.append(out.detach().cpu())
    return outputs, [p.detach().cpu() for p in model.parameters()], vectors_of(model)


@pytest.mark.parametrize("variant", ["sn", "ssn", "bsn", "bssn"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_training_is_that_of_the_cpu(backend, variant, channels_last):
    plain, x = Net(), images(4)
    on_cpu = bssn_fast.apply(copy.deepcopy(plain), variant, backend="reference")
    on_gpu = bssn_fast.apply(copy.deepcopy(plain).cuda(), variant, backend=backend)
    for a, b in zip(norms(on_cpu).values(), norms(on_gpu).values(), strict=True):
        b.load_state_dict(a.state_dict())
    on_gpu = on_gpu.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    outputs, parameters, vectors = steps(on_cpu, x)
    found, found_parameters, found_vectors = steps(on_gpu, x.cuda())
    for a, b in zip([*outputs, *parameters], [*found, *found_parameters], strict=True):
        torch.testing.assert_close(b, a, rtol=2e-3, atol=2e-4)  # other orders of sums in the layers
    for name, vector in vectors.items():
        torch.testing.assert_close(found_vectors[name].cpu(), vector, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("variant", ["sn", "bssn"])
def test_blocks_are_those_of_the_cpu(backend, variant):
    """Blocks of 15 and 45 elements, which begin at any address."""
    plain = torch.nn.Sequential(torch.nn.Conv2d(5, 9, (3, 1)), torch.nn.Flatten(), torch.nn.Linear(5, 9))
    blocks, x = {"0": 3, "2": 3}, torch.randn(9, 5)
    on_cpu = bssn_fast.apply(copy.deepcopy(plain), variant, blocks=blocks, backend="reference")
    on_gpu = bssn_fast.apply(copy.deepcopy(plain).cuda(), variant, blocks=blocks, backend=backend)
    on_gpu.load_state_dict(on_cpu.state_dict())
    for net, device in ((on_cpu, "cpu"), (on_gpu, "cuda")):
        with bssn_fast.cached(net):
            (net[2](x.to(device)).square().sum() + (net[0].weight ** 2).sum()).backward()
    for name in ("0", "2"):
        for a, b in zip(on_cpu.get_submodule(name).parameters(), on_gpu.get_submodule(name).parameters(), strict=True):
            if a.grad is not None:
                torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            bssn_fast.sigma(on_gpu)[name].cpu(), bssn_fast.sigma(on_cpu)[name], rtol=1e-5, atol=0
        )
    assert vectors_of(on_gpu)["2._u"].shape == (3, 3)


def test_autocast(backend):
    model = bssn_fast.apply(Net().cuda(), backend=backend)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        model(images(4).cuda()).float().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_evaluation_changes_nothing(backend):
    model = bssn_fast.apply(Net().cuda(), backend=backend)
    model(images(4).cuda())
    before = vectors_of(model)
    model.eval()
    first, second = model(images(4).cuda()).shape, model(images(4).cuda()).shape
    assert first == second
    after = vectors_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_default_backend_is_one_for_gpus():
    model = bssn_fast.apply(Net()).cuda()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        model(images(4).cuda())
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert any("forward_kernel" in name or "bssn" in name for name in names), names


def trained_twice(model, x):
    """Copies of the parameters and vectors after two steps."""
    steps(model, x, 2)
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]


@pytest.fixture
def reproducible(monkeypatch):
    """The same bits from the layers around ours."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def test_training_on_a_side_stream(backend, reproducible):
    """The backward pass runs in a thread of autograd, on the stream of the forward."""
    plain, x = bssn_fast.apply(Net().cuda(), backend=backend), images(4).cuda()
    other = copy.deepcopy(plain)
    expected = trained_twice(plain, x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        found = trained_twice(other, x)
    torch.cuda.synchronize()
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_training_on_a_device_that_is_not_current(backend, reproducible):
    """Needs two GPUs."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU: nothing to confuse")
    plain, x = bssn_fast.apply(Net().cuda(), backend=backend), images(4)
    here, there = copy.deepcopy(plain).to("cuda:0"), copy.deepcopy(plain).to("cuda:1")
    with torch.cuda.device(0):
        expected, found = trained_twice(here, x.to("cuda:0")), trained_twice(there, x.to("cuda:1"))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b.cpu(), a.cpu(), rtol=1e-5, atol=1e-6)


def test_data_parallel(backend):
    """Needs two GPUs."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU: no copies are made")
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 5, 3), nn.Flatten(), nn.Linear(20, 1))
    plain, x = bssn_fast.apply(plain.cuda(), backend=backend), images(4).cuda()
    several = nn.DataParallel(copy.deepcopy(plain), device_ids=[0, 1])
    expected, found = trained_twice(plain, x), trained_twice(several, x)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
