"""Where many tensors lie, found in one call."""

import struct
import sys

import pytest
import torch

from bssn_fast.backends import addresses as module
from bssn_fast.backends import extension
from bssn_fast.backends.addresses import addresses, elements
from bssn_fast.backends.environment import environment


@pytest.fixture(params=["in one call", "one by one"])
def way(request, monkeypatch):
    if request.param == "one by one":
        monkeypatch.setattr(module, "_of_torch", None)
    elif extension.module is None:
        pytest.skip("the extension is not built")


def unpacked(found):
    return list(struct.unpack(f"{len(found) // 8}q", found))


@pytest.mark.usefixtures("way")
def test_addresses_of_all_kinds_of_tensors():
    flat = torch.arange(24.0)
    tensors = [flat, flat[3:], flat.view(4, 6).mT, torch.nn.Parameter(flat.clone()), torch.empty(0), -flat.bfloat16()]
    assert unpacked(addresses(tensors, (), tuple(tensors[:2]))) == [x.data_ptr() for x in tensors + tensors[:2]]
    assert addresses() == addresses([]) == b""


@pytest.mark.usefixtures("way")
def test_freed_and_moved_memory_is_seen():
    x = torch.ones(3)
    before = addresses([x])
    x.data = torch.ones(3)
    assert unpacked(addresses([x])) == [x.data_ptr()]
    assert addresses([x]) != before
    x.untyped_storage().resize_(0)
    assert unpacked(addresses([x])) == [0]


def test_what_has_no_memory_is_an_error():
    with pytest.raises(RuntimeError, match="storage"):
        addresses([torch.ones(2), torch.eye(2).to_sparse()])
    if extension.module is not None:
        for wrong in ([None], [3], [[torch.ones(2)]]):
            with pytest.raises(RuntimeError, match="non-tensor"):
                addresses(wrong)
        with pytest.raises(TypeError):
            addresses(3)
        with pytest.raises(TypeError):
            extension.module.addresses()


def test_nothing_is_kept_alive():
    tensors = [torch.ones(2) for _ in range(3)]
    before = list(map(sys.getrefcount, tensors))
    for _ in range(10):
        addresses(tensors)
        addresses(tuple(tensors))
    assert list(map(sys.getrefcount, tensors)) == before


def test_elements_of_an_array():
    x = torch.ones(5, dtype=torch.float64)
    assert elements(x.data_ptr(), x.element_size(), (4, 0, 2)) == addresses([x[4], x[0], x[2]])


def test_environment_is_that_of_the_moment(monkeypatch):
    name = "BSSN_FAST_OF_A_TEST"
    monkeypatch.delenv(name, raising=False)
    assert environment(name) == ""
    monkeypatch.setenv(name, "größer")
    assert environment(name) == "größer"
    monkeypatch.delenv(name)
    assert environment(name) == ""
