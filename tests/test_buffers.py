import sys
import threading

import pytest
import torch
from support import Net, images

import bssn_fast
from bssn_fast.calls.memory import Pool


@pytest.fixture
def take():
    pool = Pool(8, lambda flat: [flat[:3], flat[4:]])
    return lambda dtype=torch.float32: pool.take(dtype, torch.device("cpu"))


def test_a_buffer_is_used_again_only_when_nothing_refers_to_it(take):
    views = take()
    address = views[0].data_ptr()
    part = views[1].detach()[1:]
    del views
    assert take()[0].data_ptr() != address
    del part
    found = [take() for _ in range(3)]
    assert address in [views[0].data_ptr() for views in found]
    assert len({views[0].data_ptr() for views in found}) == 3


def test_saved_for_backward_counts(take):
    x = torch.ones(3, requires_grad=True)
    views = take()
    views[0].fill_(2)
    y = (x * views[0]).sum()
    del views
    for _ in range(3):
        take()[0].fill_(7)
    y.backward()
    assert x.grad.tolist() == [2, 2, 2]


def test_numpy_array_counts(take):
    views = take()
    array = views[0].fill_(1).numpy()
    del views
    take()[0].fill_(5)
    assert array.tolist() == [1, 1, 1]


def test_dtypes_do_not_mix(take):
    a = take(torch.bfloat16)
    b = take(torch.float32)
    assert (a[0].dtype, b[0].dtype) == (torch.bfloat16, torch.float32)
    del a
    assert take(torch.float32)[0].dtype == torch.float32


def test_made_in_inference_mode_used_outside(take):
    with torch.inference_mode():
        take()
    views = take()
    assert not views[0].is_inference()


@pytest.fixture
def _quick_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_quick_switches")
@pytest.mark.parametrize("seed", range(5))
def test_several_threads_share_an_evaluated_model(seed):
    torch.manual_seed(seed)
    model = bssn_fast.apply(Net()).eval()
    x = images()
    expected = model(x).detach()
    problems = []

    def work():
        try:
            for _ in range(60):
                with torch.no_grad():
                    if not torch.allclose(model(x), expected, rtol=1e-4, atol=1e-6):
                        problems.append("wrong result")
        except Exception as error:
            problems.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_versions_of_a_later_use_are_its_own(take):
    """As those of gradients that `model.double()` has given other memory."""
    first = take()[0]
    first.data = torch.zeros(3)
    second = take()[0]
    before = second._version
    first.add_(1)
    assert second._version == before


def test_results_of_one_use_have_versions_of_their_own(take):
    first, second = take()
    before = second._version
    first.add_(1)
    assert second._version == before
    assert not first._is_view()


def test_memory_that_another_process_may_read_is_not_used_again(take):
    first = take()[0]
    handle = first.untyped_storage()._share_fd_cpu_()
    received = torch.empty(0).set_(torch.UntypedStorage._new_shared_fd_cpu(*handle))
    received.zero_()
    del first
    for _ in range(3):
        take()[0].fill_(1)
    assert not received.any()
