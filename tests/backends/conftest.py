"""The emulated GPU that the CUDA kernels' tests run on, and what Triton's interpreter needs."""

import os

import numpy as np
import pytest
from cuda_emulated import H200

from bssn_fast import backends
from bssn_fast.backends import cuda, extension

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    def create_splat(self, block, scalar):
        """Fill a block with a scalar, in the scalar's own type.

        Triton takes a comparison of two integers for an integer here, and the mask that this gives is refused by 3.9.
        """
        return interpreter.TensorHandle(np.full(block.shape, scalar.data, scalar.data.dtype), scalar.dtype.scalar)

    interpreter.InterpreterBuilder.create_splat = create_splat
    if not hasattr(interpreter.InterpretedFunction, "warmup"):  # Triton 3.5 and before
        interpreter.InterpretedFunction.warmup = lambda *arguments, **options: None


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
