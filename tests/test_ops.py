"""The two operations as torch sees them."""

import matrix
import pytest
import torch
from matrix import Case
from torch._subclasses.fake_tensor import FakeTensorMode

from bssn_fast import ops
from bssn_fast.laws import Laws
from bssn_fast.layout import Batch

CASE = Case(shapes=((4, 3, 3, 3), (5, 7), (6, 2, 3), (3, 4)), mixed_laws=True)


def arguments(x):
    """Those of the two functions."""
    batch = Batch.of(x.weights, CASE.dim_list, CASE.two_sided)
    outputs = [torch.empty_like(w) for w in x.weights]
    snapshot, sigma = torch.empty(batch.snapshot_size), torch.empty(len(CASE.shapes))
    laws = Laws.of(CASE.law_list).with_gains(x.gains)
    forward = (batch, x.weights, x.vectors, laws, 1e-12, 1, outputs, snapshot, sigma, "reference")
    grads = [torch.empty_like(w) for w in x.weights]
    backward = (batch, x.grads, x.weights, CASE.layer_list, laws, snapshot, sigma, grads, torch.empty(1), "reference")
    return forward, backward


def arguments_of_ops(x):
    (batch, weights, vectors, laws, *rest), (_, grads, _, layers, _, *rest_of_backward) = arguments(x)
    geometry = batch.dims, batch.two_sided, [], [], laws.kinds, laws.numbers, laws.gains
    return (weights, vectors, *geometry, *rest), (grads, weights, layers, *geometry, *rest_of_backward)


@pytest.mark.parametrize("backend", ["reference", ""])
def test_opcheck(backend):
    """All of torch's checks: schema, fake kernel, autograd, AOTAutograd."""
    both = ops.normalize_op, ops.normalize_backward_op
    for op, given in zip(both, arguments_of_ops(matrix.inputs(CASE)), strict=True):
        found = torch.library.opcheck(op, (*given[:-1], backend))
        assert len(found) == 4
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["reference", ""])
def test_opcheck_of_blocks(backend):
    """Of two and of three matrices of 3 x 4, the first dimension of the latter only counting them."""
    weights, rows = [torch.randn(6, 4), torch.randn(3, 3, 4)], 5
    vectors = [torch.nn.functional.normalize(torch.randn(n, size), dim=1) for n in (2, 3) for size in (3, 4)]
    geometry = [0, 0], [False, False], [2, 3], [False, True], [0] * rows, [1.0] * rows, []
    snapshot, sigma = torch.empty(8 * rows), torch.empty(rows)
    outputs = [torch.empty_like(w) for w in weights]
    forward = (weights, vectors, *geometry, 1e-12, 1, outputs, snapshot, sigma, backend)
    backward = ([torch.ones(3, 3, 4)], weights, [1], *geometry, snapshot, sigma, [torch.empty(3, 3, 4)], None, backend)
    for op, given in ((ops.normalize_op, forward), (ops.normalize_backward_op, backward)):
        assert set(torch.library.opcheck(op, given).values()) == {"SUCCESS"}
    ops.normalize_op(*forward)
    expected = torch.linalg.matrix_norm(torch.cat([weights[0].view(2, 3, 4), weights[1]]), 2)
    for _ in range(200):
        ops.normalize_op(*forward)
    torch.testing.assert_close(sigma, expected, rtol=1e-4, atol=0)


def test_fake_tensors_compute_nothing(monkeypatch):
    def called(*args):
        pytest.fail("a backend was asked for")

    monkeypatch.setattr(ops.backends, "run", called)
    with FakeTensorMode() as mode:
        x = matrix.inputs(CASE)
        fake = matrix.Inputs(*([mode.from_tensor(t) if not hasattr(t, "fake_mode") else t for t in part]
                               for part in (x.weights, x.vectors, x.grads, x.gains)))  # fmt: skip
        forward, backward = arguments(fake)
        ops.normalize(*forward)
        ops.normalize_backward(*backward)


@pytest.mark.parametrize("backend", ["reference", ""])
@pytest.mark.parametrize("case", [c for c in matrix.CASES if c.weight_dtype == torch.float32], ids=str)
def test_default_backend_and_reference(backend, case):
    matrix.check(backend, case)
