"""No more memory than torch's spectral norm takes, and none that grows."""

import functools
import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from support import Net, images, original
from torch import nn

import bssn_fast
from bssn_fast.calls import memory
from bssn_fast.modules.group import groups_of

PEAK = """
import sys, torch
from torch import nn
import bssn_fast

torch.set_num_threads(1)
channels, layers = (3, 64, 128, 256, 512, 512, 512), []
for i, o in zip(channels, channels[1:]):
    layers += [nn.Conv2d(i, o, 3, padding=1, stride=2 if 64 < o < 512 else 1), nn.LeakyReLU(0.1)]
model = nn.Sequential(*layers)
if sys.argv[1] == "torch":
    for layer in layers[::2]:
        nn.utils.parametrizations.spectral_norm(layer)
else:
    bssn_fast.apply(model, sys.argv[1])
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

def status(key):  # in MB
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024

before = status("VmRSS")
for _ in range(2):
    optimizer.zero_grad()
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
print(status("VmHWM") - before)
"""


def resident():
    """How many bytes of memory this process holds; 0 where that is not known."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


@pytest.fixture(scope="module")
def peak():
    """How many MB two steps of training add to 24 MB of weights."""

    @functools.cache
    def measure(which):
        call = [sys.executable, "-c", PEAK, which]
        return float(subprocess.run(call, capture_output=True, text=True, check=True, timeout=300).stdout)

    return measure


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("variant", ["sn", "bssn"])
def test_peak(variant, peak):
    assert peak(variant) <= peak("torch")


@pytest.mark.parametrize("kept", [False, True])
def test_gradients_come_to_lie_where_the_normalised_weights_were(kept):
    """Unless someone still holds those."""
    model = bssn_fast.apply(Net())
    seen, held = [], []

    def look(layer, args):
        seen.append(layer.weight.untyped_storage().data_ptr())
        held.extend([layer.weight] * kept)

    model.first.register_forward_pre_hook(look)
    loss = model(images()).square().sum()
    values = [w.detach().clone() for w in held]
    loss.backward()
    assert (original(model.first).grad.untyped_storage().data_ptr() == seen[0]) != kept
    assert all(map(torch.equal, held, values))


@pytest.mark.parametrize("update", ["forward", "access"])
def test_nothing_grows(update):
    model = bssn_fast.apply(Net(), update=update)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = images()

    def steps(n):
        for j in range(n):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
            if j % 10 == 0:
                with torch.no_grad():
                    model.eval()(x), model.first.weight
                    model.first.weight = torch.randn(8, 3, 3, 3)
                model.train()
        gc.collect()
        tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        return tensors, len(gc.get_objects()), resident()

    steps(50)
    tensors, objects, before = steps(50)
    more = 1000 if update == "forward" else 200
    after = steps(more)
    assert after[0] <= tensors
    assert after[1] <= objects + 100 + more // 5  # the garbage collector's and pytest's own
    assert after[2] <= before + 8 * 2**20


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_ended_threads_and_blocks_have_left_is_let_go():
    model = bssn_fast.apply(nn.Sequential(nn.Linear(3, 3)), "sn")
    leave = model[0].register_forward_hook(lambda *_: sys.exit())
    thread = threading.Thread(target=lambda: model(torch.randn(2, 3)))
    thread.start()
    thread.join()
    leave.remove()
    (group,) = groups_of(model)
    assert len(group.calls) == 1  # `sys.exit` in a hook leaves no time to end
    seen = []
    handle = model[0].register_forward_hook(lambda *_: seen.append(len(group.calls)))
    model(torch.randn(2, 3))
    handle.remove()
    assert seen == [1]

    with nn.utils.parametrize.cached():
        kept = weakref.ref(model[0].weight)
    model(torch.randn(2, 3))
    gc.collect()
    assert kept() is None


def test_threads_search_the_same_buffers(monkeypatch):
    """Another thread may have gone on in the search at any moment."""
    shelf = memory._Shelf()
    for _ in range(3):
        shelf.add([torch.empty(2)])
    held = [view for buffer in shelf._buffers for view in buffer.take()]  # none is free
    assert len(held) == 3

    class Hurried(list):
        def __len__(self):
            shelf._next = 3 if shelf._next < 3 else shelf._next  # as the other thread has left it
            return super().__len__()

    shelf._next = 2
    assert shelf._search(Hurried(shelf._buffers)) is None
