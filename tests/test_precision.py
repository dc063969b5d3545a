"""Autocast and half-precision models: what is computed in which dtype, and how exactly."""

import copy

import pytest
import torch
from support import LAYER_NAMES, Net, images, norm_of, norms, original
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import bssn_fast
from bssn_fast import reference

HALVES = [torch.float16, torch.bfloat16]


def exact_sigma(layer):
    norm = norm_of(layer)
    vectors = tuple(v.double() for v in norm.buffers())
    return reference.spectral_norm(original(layer).detach().double(), vectors, norm.dim)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("backend", ["reference", ""])
def test_sigma_is_that_of_full_precision(dtype, training, autocast, backend):
    """In a half-precision model the weights are rounded, but nothing else is."""
    model = bssn_fast.apply(Net(), backend=backend).train(training)
    x = images()
    if not autocast:
        model, x = model.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        model(x)
    for name, sigma in bssn_fast.sigma(model).items():
        assert sigma.dtype == torch.float32
        assert all(v.dtype == torch.float32 for v in norms(model)[name].buffers())
        expected = exact_sigma(model.get_submodule(name))
        assert abs(sigma - expected) <= 1e-5 * expected, name


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("backend", ["reference", ""])
def test_sigma_beyond_the_range_of_float16(dtype, autocast, backend):
    layer = nn.Linear(300, 300, bias=False)
    with torch.no_grad():
        layer.weight.fill_(500)
    bssn_fast.apply(layer, "sn", backend=backend)
    x = torch.randn(4, 300)
    if not autocast:
        layer, x = layer.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = layer(x)
        out.float().square().sum().backward()
    assert out.dtype == dtype
    assert bssn_fast.sigma(layer)[""].item() == pytest.approx(1.5e5, rel=1e-5)
    expected = x.float().sum(1, keepdim=True).expand(4, 300) / 300
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-3)
    assert original(layer).grad.isfinite().all()


class Casts(TorchDispatchMode):
    """Collects the shapes of all tensors that are converted to another dtype."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("dtype", "compiled"), [(torch.float16, False), (torch.bfloat16, False), (torch.float16, True)]
)
def test_weights_are_not_cast_after_they_are_normalised(dtype, compiled):
    """Neither are their gradients: the operations write autocast's dtype and read it."""
    model = bssn_fast.apply(Net())
    shapes = {tuple(original(model.get_submodule(n)).shape) for n in LAYER_NAMES if n != "embed"}
    casts = Casts()
    run = model
    if compiled:
        torch._dynamo.reset()

        def look(graph, _):
            for node in graph.graph.nodes:
                if node.target in (torch.ops.aten._to_copy.default, torch.ops.prims.convert_element_type.default):
                    casts.shapes.append(tuple(node.args[0].meta["val"].shape))
            return graph

        run = torch.compile(lambda x: model(x), backend=aot_autograd(fw_compiler=look), fullgraph=True)
        with torch.autocast("cpu", dtype):
            loss = run(images()).float().sum()
        loss.backward()
    else:
        with casts:
            with torch.autocast("cpu", dtype):
                loss = run(images()).float().sum()
            loss.backward()
    assert (2, 3, 6, 6) in casts.shapes  # the images are
    assert not shapes & set(casts.shapes)
    assert all(original(model.get_submodule(n)).grad.dtype == torch.float32 for n in LAYER_NAMES)


def test_gradient_scaler():
    """Training in float16, with steps that overflow in the beginning, is training in float32."""
    half = bssn_fast.apply(Net())
    full = copy.deepcopy(half)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05) for net in (half, full)]
    start = copy.deepcopy(list(full.parameters()))
    skipped = steps = 0
    while steps < 10:
        x = images(4)
        with torch.autocast("cpu", torch.float16):
            loss = half(x).float().square().mean() + half(x.flip(0)).float().mean()
        optimizers[0].zero_grad()
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizers[0])
        scaler.update()
        assert all(v.isfinite().all() for norm in norms(half).values() for v in norm.buffers())
        expected = full(x).square().mean() + full(x.flip(0)).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=0.02, abs=0.02)
        if scaler.get_scale() < scale:
            skipped += 1
            continue
        steps += 1
        optimizers[1].zero_grad()
        expected.backward()
        optimizers[1].step()
    assert skipped
    for p, q, s in zip(half.parameters(), full.parameters(), start, strict=True):
        assert (p - q).norm() <= 0.04 * (q - s).norm() + 1e-3 * q.norm()
