"""The emulated GPU that the CUDA kernels' tests run on."""

import pytest
from cuda_emulated import H200

from bssn_fast import backends
from bssn_fast.backends import cuda, extension


@pytest.fixture
def gpu(monkeypatch):
    """Makes the backend cuda serve CPU tensors by emulating a GPU: H200, or what the returned function is given."""

    def emulate(module):
        cuda._table.cache_clear()  # its tables know how much memory a call needs on the GPU before
        monkeypatch.setattr(extension, "module", module)

    monkeypatch.setattr(cuda, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(cuda, "why_unavailable", lambda device: None)
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    backends.forget()
    emulate(H200)
    yield emulate
    backends.forget()
    cuda._table.cache_clear()
