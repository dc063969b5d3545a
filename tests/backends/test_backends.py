"""Which backend is taken, and what is said where one cannot be."""

import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import bssn_fast
from bssn_fast import backends
from bssn_fast.backends import cuda, extension

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("BSSN_FAST_BACKEND", raising=False)
    backends.forget()
    yield
    backends.forget()


@pytest.mark.parametrize("name", backends.NAMES)
def test_each_has_the_four_names(name):
    module = backends._module(name)
    assert isinstance(module.DEVICES, tuple)
    assert module.why_unavailable(CPU) is None or module.why_unavailable(CPU)
    assert callable(module.forward)
    assert callable(module.backward)


def test_default_is_the_compiled_one_where_it_is_built():
    expected = "cpu" if backends.why_unavailable("cpu", "cpu") is None else "reference"
    assert backends.get("", CPU).__name__.endswith(expected)


def test_default_from_the_environment(monkeypatch):
    monkeypatch.setenv("BSSN_FAST_BACKEND", "reference")
    assert backends.get("", CPU).__name__.endswith("reference")
    monkeypatch.setenv("BSSN_FAST_BACKEND", "cudda")
    with pytest.raises(bssn_fast.BackendUnavailableError, match=r"'cudda'.*reference"):
        backends.get("", CPU)


@pytest.mark.parametrize("name", ["triton", "cuda", "tpu"])
def test_one_that_cannot_serve_says_why(name):
    with pytest.raises(bssn_fast.BackendUnavailableError, match=rf"'{name}' cannot be used on cpu: \w+"):
        backends.get(name, CPU)


def test_the_one_asked_for_is_used(monkeypatch):
    reference = backends.get("reference", CPU)
    calls = []
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *args: calls.append(1) or forward(*args))
    model = bssn_fast.apply(nn.Linear(3, 2), backend="reference")
    calls.clear()
    model(torch.randn(1, 3)).sum().backward()
    assert calls == [1]


NO_CODE = 209  # CUDA's error for a GPU that the module has no code for


class FourGpus:
    """Stands for a machine with GPUs of several generations, and a module built for some of them."""

    capabilities = ((9, 0), (7, 5), (6, 0), (13, 0))

    def __init__(self):
        self.probed = []

    def compile_probe(self):
        self.probed.append(1)
        raise RuntimeError("ptxas fatal:\n  Value 'sm_130' is not defined")

    def cuda_forward(self):
        raise AssertionError("nothing is launched")

    def cuda_status(self, index):
        return 0 if self.capabilities[index] in ((9, 0), (7, 5)) else NO_CODE

    def cuda_error_string(self, error):
        return {NO_CODE: "no kernel image is available for execution on the device"}[error]


@pytest.fixture
def gpus(monkeypatch):
    triton = pytest.importorskip("triton")
    from bssn_fast.backends.triton import kernels

    fake = FourGpus()
    monkeypatch.setattr(triton, "__version__", "3.4.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: fake.capabilities[device.index])
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(extension, "module", fake)
    monkeypatch.setattr(kernels, "compile_probe", fake.compile_probe)
    return fake


def gpu(index):
    return torch.device("cuda", index)


def test_cuda_is_the_default_of_gpus_that_it_has_code_for(gpus):
    """Whether Triton works is not asked, which would take a second."""
    assert backends.get("", gpu(0)) is cuda
    assert not gpus.probed


def test_triton_is_the_default_of_gpus_that_cuda_has_no_code_for(gpus, monkeypatch):
    """Decided once for each device, by compiling: the calls to come only look it up."""
    probed = []
    monkeypatch.setattr(sys.modules["bssn_fast.backends.triton.kernels"], "compile_probe", lambda: probed.append(1))
    for _ in range(3):
        assert backends.get("", gpu(3)) is backends._module("triton")
    assert len(probed) == 1


def test_triton_that_cannot_compile_says_why(gpus):
    for _ in range(2):
        with pytest.raises(bssn_fast.BackendUnavailableError, match=r"'triton'.*cuda:0: .*RuntimeError: ptxas fatal"):
            backends.get("triton", gpu(0))
    assert len(gpus.probed) == 1


def refuse(*args):
    raise bssn_fast.BackendUnavailableError("bssn_fast backend 'triton' cannot be used: out of resource")


@pytest.fixture
def computed(gpus, monkeypatch):
    """Small kernels compile, large ones do not; a list of who computes instead."""
    computed = []
    monkeypatch.setattr(sys.modules["bssn_fast.backends.triton.kernels"], "compile_probe", lambda: None)
    for operation in ("forward", "backward"):
        monkeypatch.setattr(backends._module("triton"), operation, refuse)
        monkeypatch.setattr(backends._module("reference"), operation, lambda *args: computed.append("reference"))
    return computed


@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_triton_that_fails_at_a_call_gives_way_with_one_warning(computed, operation):
    with pytest.warns(RuntimeWarning, match="triton.*out of resource") as caught:
        backends.run(operation, "", gpu(3))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.run(operation, "", gpu(3))
    assert computed == ["reference"] * 2
    assert backends.default(gpu(3)) == "reference"


def test_triton_that_was_asked_for_does_not_give_way(computed, monkeypatch):
    for _ in range(2):
        with pytest.raises(bssn_fast.BackendUnavailableError, match="out of resource"):
            backends.run("forward", "triton", gpu(3))
    monkeypatch.setenv("BSSN_FAST_BACKEND", "triton")
    with pytest.raises(bssn_fast.BackendUnavailableError, match="out of resource"):
        backends.run("forward", "", gpu(3))
    assert not computed
    monkeypatch.delenv("BSSN_FAST_BACKEND")
    assert backends.default(gpu(3)) == "triton"  # nobody was told otherwise


def test_triton_that_fails_for_what_cuda_leaves_to_it_does_not_take_cuda_away(gpus, computed):
    for operation in ("forward", "backward"):
        for _ in range(2):
            cuda._instead(operation, gpu(0))
    assert computed == ["reference"] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.default(gpu(0)) == "cuda"
    assert backends.given_up
    backends.forget()
    assert not backends.given_up


def test_gpus_too_old_for_triton_are_not_tried(gpus):
    assert backends.get("", gpu(1)) is cuda
    assert not gpus.probed
    with pytest.raises(bssn_fast.BackendUnavailableError, match=r"'triton'.*cuda:1: .*8\.0, this one has 7\.5"):
        backends.get("triton", gpu(1))


def test_a_triton_that_is_too_old_is_not_tried(gpus, monkeypatch):
    """A small kernel would compile, and no other."""
    monkeypatch.setattr(sys.modules["triton"], "__version__", "3.3.1")
    with pytest.raises(bssn_fast.BackendUnavailableError, match=r"'triton'.*3\.3\.1 is too old: 3\.4 .* torch 2\.8"):
        backends.get("triton", gpu(0))
    assert not gpus.probed


@pytest.mark.parametrize(("index", "arch"), [(2, "60"), (3, "130")])
def test_gpus_without_code_of_either_get_the_reference_and_a_warning(gpus, index, arch):
    with pytest.warns(RuntimeWarning, match=rf"no kernels.*cuda:{index}.*cuda: .*no kernel image.*triton: "):
        assert backends.get("", gpu(index)) is backends._module("reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert backends.get("", gpu(index)) is backends._module("reference")
    with pytest.raises(bssn_fast.BackendUnavailableError, match=rf"'cuda'.*no kernel image.*ARCHS={arch} "):
        backends.get("cuda", gpu(index))


def test_each_gpu_has_a_default_of_its_own(gpus):
    assert backends.default(gpu(1)) == "cuda"
    with pytest.warns(RuntimeWarning):
        assert backends.default(gpu(2)) == "reference"
