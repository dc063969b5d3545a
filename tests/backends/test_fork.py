"""A process that is forked while another of its threads is inside a kernel."""

import os
import subprocess
import sys

import pytest

from bssn_fast.backends import extension

if extension.module is None:
    pytest.skip(str(extension.why_missing()), allow_module_level=True)

PROGRAM = """
import os, sys, threading
import torch
from bssn_fast import ops
from bssn_fast.backends import cpu
from bssn_fast.laws import Law, Laws
from bssn_fast.layout import Batch

torch.set_num_threads(2)
LAWS = Laws.of([Law()])
SIZES = (200, 900, 100, 1800)
weight = torch.randn(200, 100, 3, 3)


def outcome():  # without any operation of torch that would use several threads: these hang in a child
    vectors = [torch.full((n,), n**-0.5) for n in SIZES]
    out, grad_weight, sigma = torch.empty_like(weight), torch.empty_like(weight), torch.empty(1)
    batch = Batch.of([weight], [0], [True])
    snapshot = torch.empty(batch.snapshot_size)
    ops.normalize(batch, [weight], vectors, LAWS, 1e-12, 2, [out], snapshot, sigma, "cpu")
    ops.normalize_backward(batch, [out], [weight], [0], LAWS, snapshot, sigma, [grad_weight], None, "cpu")
    return cpu.hashes([out, grad_weight, sigma, *vectors])


def repeat(calls):
    while not stop.is_set():
        assert outcome() == expected
        calls.append(1)


expected = outcome()
stop, calls = threading.Event(), ([], [])
threads = [threading.Thread(target=repeat, args=(c,)) for c in calls]
for thread in threads:
    thread.start()
for _ in range(10):
    before = [len(c) for c in calls]
    while any(len(c) == b for c, b in zip(calls, before)):  # both threads are at work
        pass
    child = os.fork()
    if child == 0:
        os._exit(0 if [outcome() for _ in range(3)] == [expected] * 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop.set()
for thread in threads:
    thread.join()
assert outcome() == expected
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_fork_while_other_threads_are_in_a_kernel():
    """Each child computes alone, and what it computes is right; the parent's threads go on."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100, check=False)
    assert run.stdout == "done\n", run.stderr
