"""torch.export, ONNX and torch.jit.trace: models in evaluation, in plain operations."""

import copy
import io

import pytest
import torch
from support import Net, images, original, vectors_of
from torch import nn

import bssn_fast

EXPORTERS = {
    "export": lambda model, x: torch.export.export(model, (x,)),
    "strict export": lambda model, x: torch.export.export(model, (x,), strict=True),
}


@pytest.fixture
def model():
    return bssn_fast.apply(Net()).eval()


def operations(program):
    """Names of all operations, also of the graphs inside."""
    graphs = [m.graph for m in program.graph_module.modules() if hasattr(m, "graph")]
    return {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_export(model, exporter):
    x = images()
    expected = model(x)
    before = vectors_of(model)
    program = EXPORTERS[exporter](model, x)
    found = operations(program)
    assert any(name.startswith("aten.conv2d") for name in found)
    assert not any("bssn" in name for name in found), found
    assert set(program.state_dict) == set(model.state_dict())
    torch.testing.assert_close(program.module()(x), expected)
    assert all(torch.equal(v, before[name]) for name, v in vectors_of(model).items())
    assert torch.equal(model(x), expected)  # nothing is left of the tensors without values


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_training_is_refused(model, exporter):
    with pytest.raises(Exception, match=r"model\.eval\(\)"):
        EXPORTERS[exporter](model.train(), images())
    model(images()).sum().backward()


def test_half_precision(model):
    x = images().bfloat16()
    expected = model.bfloat16()(x)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)


def test_a_cached_block_does_not_make_the_weights_constants(model):
    x = images()
    with bssn_fast.cached(model):
        model(x)
        program = torch.export.export(model, (x,))
    state = program.state_dict["first.parametrizations.weight.original"]
    before = program.module()(x)
    with torch.no_grad():
        state.copy_(state.flip(0))
    assert not torch.equal(program.module()(x), before)


def test_onnx(model):
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    x = images()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert {node.domain for node in program.model.graph} == {""}  # ONNX's own operations
    (name,) = [value.name for value in program.model_proto.graph.input]
    (found,) = ReferenceEvaluator(program.model_proto).run(None, {name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*legacy.*:UserWarning")
def test_older_exporter_to_onnx(model):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    x, file = images(), io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False)
    program = onnx.load_from_string(file.getvalue())
    assert {node.domain for node in program.graph.node} == {""}
    (found,) = ReferenceEvaluator(program).run(None, {program.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-5, atol=1e-5)


class Functional(nn.Module):
    """Its forward reads the weight of a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 2)
        self.traced = None

    def forward(self, x):
        return self.second(torch.tanh(nn.functional.linear(x, self.first.weight, self.first.bias)))


@pytest.mark.parametrize("in_a_call", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_symbolic_trace(training, in_a_call):
    """Weights are no constants of the graph: it follows the model, and trains it."""
    model = bssn_fast.apply(Functional().double(), "sn").train(training)
    x, traced = torch.randn(3, 5, dtype=torch.float64), []
    model(x)
    twin = copy.deepcopy(model)
    if in_a_call:
        handle = model.register_forward_pre_hook(lambda *_: traced.append(torch.fx.symbolic_trace(model)))
        model(x), twin(x)
        handle.remove()
    else:
        traced.append(torch.fx.symbolic_trace(model))
    for _ in range(2):
        for net, call in ((model, traced[0]), (twin, twin)):
            net.zero_grad()
            call(x).square().sum().backward()
            with torch.no_grad():
                for p in net.parameters():
                    p.sub_(p.grad, alpha=1e-3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_torch_jit_trace(model):
    x = images()
    traced = torch.jit.trace(model, (x,))
    torch.testing.assert_close(traced(x), model(x))
    with torch.no_grad():
        original(model.first).mul_(2).add_(0.1)  # the traced model shares the weight and the vectors
    expected = model(x)  # sees that the vectors do not belong to the weight any more
    torch.testing.assert_close(traced(x), expected)
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        torch.jit.trace(model.train(), (x,))


def test_torch_jit_script(model):
    with pytest.raises(RuntimeError, match=r"first: torch\.jit\.script.*bssn_fast\.remove"):
        torch.jit.script(model)
    plain, x = bssn_fast.remove(copy.deepcopy(model)), images()
    torch.testing.assert_close(torch.jit.script(plain)(x), model(x))


class Times(nn.Module):
    """Multiplies by a normalised weight that is an input, as of a hypernetwork."""

    def __init__(self):
        super().__init__()
        self.register_buffer("u", nn.functional.normalize(torch.randn(4), dim=0))
        self.register_buffer("v", nn.functional.normalize(torch.randn(6), dim=0))

    def forward(self, weight):
        n = int(self.training)
        (normalized,), _ = bssn_fast.normalize([weight], [(self.u, self.v)], n_power_iterations=n, scale=2.0)
        return normalized * 3


RECORDERS = {
    "torch.jit.trace": lambda model, x: torch.jit.trace(model, (x,), check_trace=False),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("training", [True, False])
def test_normalize(recorder, training):
    """Another weight than the one that was recorded, and u and v change as they should."""
    model = Times().train(training)
    recorded, weight = RECORDERS[recorder](model, torch.randn(4, 6)), torch.randn(4, 6)
    twin = Times().train(training)
    twin.load_state_dict(recorded.state_dict())
    torch.testing.assert_close(recorded(weight), twin(weight))
    torch.testing.assert_close(dict(recorded.named_buffers()), dict(twin.named_buffers()))
