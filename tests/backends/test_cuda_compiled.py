"""The CUDA kernels as compiled: no spills, no stack, no more registers than launches count on, not too much code."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bssn_fast.backends import extension

REGISTERS = {"forward": 255, "backward": 80}
"""Of 256 threads: one block of the forward kernel fits on a multiprocessor, and three of the backward kernel."""

CODE = {"forward": 416 << 10, "backward": 50 << 10}
"""Bytes. What a launch runs comes through instruction caches of about 128 KiB; paths that no layer takes do not."""

KERNELS = 2 * 3 * 3  # forward and backward, dtypes of the weights, layers in short or long arguments or in a table


def cuobjdump() -> str | None:
    """The tool of the CUDA toolkit, or the copy that comes with triton."""
    try:
        import triton

        shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    except ImportError:
        shipped = Path()
    return shutil.which("cuobjdump", path=os.pathsep.join([os.environ.get("PATH", ""), str(shipped)]))


if not hasattr(extension.module, "cuda_forward"):
    pytest.skip("the extension was built without CUDA", allow_module_level=True)
if cuobjdump() is None:
    pytest.skip("cuobjdump was not found", allow_module_level=True)


def output(*options: str) -> str:
    command = [str(cuobjdump()), *options, extension.module.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def usage() -> dict[str, list[tuple[str, dict[str, int]]]]:
    """For each architecture, (kernel, resources) of each of its kernels."""
    found: dict[str, list[tuple[str, dict[str, int]]]] = {}
    for part in output("--dump-resource-usage").split("Fatbin elf code:")[1:]:
        arch = re.findall(r"arch = (sm_\w+)", part)[0]
        for name, resources in re.findall(r"Function (\w+):\s+(.*)", part):
            kind = re.search(r"\d(forward|backward)_kernelI", name)  # file names are parts of some names
            if kind:
                numbers = {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", resources)}
                found.setdefault(arch, []).append((kind[1], numbers))
    return found


def test_every_architecture_has_every_kernel(usage):
    assert usage
    for arch, kernels in usage.items():
        assert len(kernels) == KERNELS, arch


def test_no_spills_and_no_stack(usage):
    for arch, kernels in usage.items():
        for kind, numbers in kernels:
            assert numbers["STACK"] == 0, (arch, kind, numbers)
            assert numbers["LOCAL"] == 0, (arch, kind, numbers)


def test_registers_leave_room_for_the_blocks(usage):
    for arch, kernels in usage.items():
        for kind, numbers in kernels:
            assert numbers["REG"] <= REGISTERS[kind], (arch, kind, numbers)


def test_code_stays_small():
    for part in output("--dump-elf").split("Fatbin elf code:")[1:]:
        arch = re.findall(r"^arch = (sm_\w+)", part, flags=re.MULTILINE)[0]
        sections = re.findall(r"\s([0-9a-f]+) +\S+ +\S+ +PROGBITS.*\.text\.\w*\d(forward|backward)_kernelI", part)
        assert sections, arch
        for size, kind in sections:
            assert int(size, 16) <= CODE[kind], (arch, kind)


def test_newest_architecture_as_ptx(usage):
    """For GPUs that are yet to come."""
    newest = max(int(re.sub(r"\D", "", arch)) for arch in usage)
    assert f"sm_{newest}.ptx" in output("--list-ptx")
