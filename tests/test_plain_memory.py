"""Which tensors a kernel may read by their address."""

import pytest
import torch
from torch.autograd import forward_ad

from bssn_fast.layout import has_plain_memory, has_tangent, is_plain


def inference_tensor():
    with torch.inference_mode():
        return torch.randn(3, 4)


class WithFunction(torch.Tensor):
    """A subclass that only says what operations on it do; its memory is its own."""


class Wrapper(torch.Tensor):
    """A subclass without memory: what it holds is elsewhere."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("no operation may be needed to find out")


class WithMemory(torch.Tensor):
    """A subclass with memory, which means what its `__torch_dispatch__` says."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_subclass(cls, inner)

    __torch_dispatch__ = Wrapper.__torch_dispatch__


PLAIN = {
    "tensor": lambda: torch.randn(3, 4),
    "parameter": lambda: torch.nn.Parameter(torch.randn(3, 4)),
    "frozen parameter": lambda: torch.nn.Parameter(torch.randn(3, 4), requires_grad=False),
    "buffer": lambda: torch.nn.Buffer(torch.randn(3, 4)),
    "result of an operation": lambda: torch.nn.Parameter(torch.randn(3, 4)) * 2,
    "inference tensor": inference_tensor,
    "view in a tensor": lambda: torch.randn(6, 8)[1:4, ::2].mT,
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "scalar": lambda: torch.tensor(1.0),
    "empty": lambda: torch.empty(0, 4),
    "half": lambda: torch.randn(3, 4).half(),
    "subclass with __torch_function__": lambda: torch.randn(3, 4).as_subclass(WithFunction),
    "from numpy": lambda: torch.from_numpy(torch.randn(3, 4).numpy()),
    "shared": lambda: torch.randn(3, 4).share_memory_(),
    "negated twice": lambda: torch._neg_view(torch._neg_view(torch.randn(3, 4))),
    "resolved": lambda: torch._neg_view(torch.randn(3, 4)).resolve_neg(),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain(kind):
    tensor = PLAIN[kind]()
    assert is_plain(tensor)
    assert has_plain_memory(tensor)
    assert not has_tangent(tensor)


@pytest.mark.parametrize("kind", PLAIN)
def test_nothing_of_the_surroundings_matters(kind):
    tensor = PLAIN[kind]()
    for surroundings in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu"), torch.device("meta")):
        with surroundings:
            assert has_plain_memory(tensor)
    assert has_plain_memory(tensor)


def fake_tensor():
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(torch.randn(3, 4))


def functional_tensor_of_python():
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

    with FunctionalTensorMode():
        return FunctionalTensor.to_functional(torch.randn(3, 4))


def jagged():
    return torch.nested.nested_tensor([torch.randn(2), torch.randn(3)], layout=torch.jagged)


NOT_PLAIN = {
    "meta": lambda: torch.empty(3, 4, device="meta"),
    "negative bit": lambda: torch._neg_view(torch.randn(3, 4)),
    "imaginary part of a conjugate": lambda: torch.randn(3, 4, dtype=torch.complex64).conj().imag,
    "conjugate bit": lambda: torch.randn(3, 4, dtype=torch.complex64).conj(),
    "zero tensor": lambda: torch._efficientzerotensor(3, 4),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 0, torch.qint8),
    "functional": lambda: torch._to_functional_tensor(torch.randn(3, 4)),
    "functional of Python": functional_tensor_of_python,
    "fake": fake_tensor,
    "wrapper": lambda: Wrapper(torch.randn(3, 4)),
    "subclass with __torch_dispatch__": lambda: WithMemory(torch.randn(3, 4)),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2), torch.randn(3)]),
    "jagged": jagged,
    "mkldnn": lambda: torch.randn(3, 4).to_mkldnn(),
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_not_plain(kind):
    if kind == "mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch lacks it")
    tensor = NOT_PLAIN[kind]()
    assert not is_plain(tensor)
    assert not has_plain_memory(tensor)


def seen_in(transform):
    """What the function that a transform calls finds its argument to be."""
    seen = []

    def probe(x):
        seen.append((is_plain(x), has_plain_memory(x)))
        return (x * x).sum()

    transform(probe)
    return seen


X = torch.randn(3, 4)
TRANSFORMS = {
    "vmap": lambda f: torch.vmap(f)(X),
    "vmap of another dimension": lambda f: torch.vmap(f, in_dims=1)(X),
    "grad": lambda f: torch.func.grad(f)(X),
    "vjp": lambda f: torch.func.vjp(f, X),
    "jvp": lambda f: torch.func.jvp(f, (X,), (X,)),
    "functionalize": lambda f: torch.func.functionalize(f)(X),
    "hessian": lambda f: torch.func.hessian(f)(X),
    "vmap that is_grads_batched uses": lambda f: torch._vmap_internals._vmap(f)(X),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_wrapped_by_a_transform(transform):
    seen = seen_in(TRANSFORMS[transform])
    assert seen
    assert not any(plain or memory for plain, memory in seen)


def test_batched_gradients_of_a_recorded_graph():
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            seen.append((is_plain(grad), has_plain_memory(grad)))
            return 2 * grad

    x = torch.randn(3, requires_grad=True)
    torch.autograd.grad(Probe.apply(x), x, torch.eye(3), is_grads_batched=True)
    assert seen == [(False, False)]


def freed(x):
    x.untyped_storage().resize_(0)
    return x


def shortened(x):
    x.untyped_storage().resize_(x.untyped_storage().nbytes() - 1)
    return x


@pytest.mark.parametrize("change", [freed, shortened])
@pytest.mark.parametrize("kind", ["tensor", "parameter", "channels last", "half"])
def test_memory_that_is_gone(kind, change):
    """Such a tensor looks as it did; only its storage tells."""
    tensor = change(PLAIN[kind]())
    assert is_plain(tensor)
    assert not has_plain_memory(tensor)


def test_end_of_the_storage():
    storage = torch.randn(12)
    assert has_plain_memory(storage.as_strided((3, 2), (5, 1), 0))
    assert has_plain_memory(storage.as_strided((3, 2), (4, 1), 2))
    assert has_plain_memory(storage.as_strided((1, 2), (4000, 1), 10))
    shifted = storage.as_strided((3, 2), (5, 1), 0)
    storage.untyped_storage().resize_(11 * 4)
    assert not has_plain_memory(shifted)
    assert has_plain_memory(storage.as_strided((3, 2), (4, 1), 1))


def test_tangents():
    x, tangent = torch.randn(3), torch.randn(3)
    assert not has_tangent(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        assert has_tangent(dual)
        assert has_tangent(2 * dual)
        assert has_tangent(torch.nn.Parameter(x) * dual)
        assert not has_tangent(x)
        assert is_plain(dual)  # nothing else tells
    assert not has_tangent(dual)


def test_tangents_inside_transforms():
    seen = []

    def probe(x):
        seen.append((has_tangent(x), has_tangent(X)))
        return (x * x).sum()

    torch.func.jvp(probe, (X,), (X,))
    assert seen.pop() == (True, False)
    torch.func.linearize(probe, X)
    assert seen.pop() == (True, False)
    torch.func.grad(probe)(X)
    assert seen.pop() == (False, False)
    torch.vmap(probe)(X)
    assert seen.pop() == (False, False)
