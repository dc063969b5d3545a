"""The Triton kernels as they would be compiled for GPUs that are not there: the same arguments and options as in use.

Run by test_triton.py. Triton brings its own ptxas and cuobjdump.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.work.layer_sets import load
from bssn_fast import layout
from bssn_fast.backends import triton as backend
from bssn_fast.backends.triton import kernels, launch, prepared
from bssn_fast.laws import Law, Laws
from bssn_fast.layout import needs_two_sides

ARCHS = [80, 90, 100, 120]

RESNET = [  # each shape of tile that a residual discriminator needs
    ((64, 3, 3, 3), 0, True),
    ((512, 512, 3, 3), 0, True),
    ((1024, 1024, 3, 3), 0, True),
    ((1024, 512, 1, 1), 0, False),
    ((1, 1024), 0, False),
]
CNN = [((64, 3, 3, 3), 0, True), ((64, 64, 4, 4), 0, True), ((128, 64, 3, 3), 0, True), ((1, 8192), 0, False)]
ODD = [  # tiles of every other kind
    ((256, 128, 4, 4), 1, True),
    ((256, 128, 4, 4), 1, False),
    ((100, 77), 0, False),
    ((64, 3, 3, 3), 0, False),
    ((128, 8, 2, 2), 0, True),
    ((256, 16, 1, 1), 0, False),
    ((128, 32, 41), 0, True),
    ((256, 5, 41), 0, True),
    ((8, 4, 300), 0, True),
    ((8, 4, 2048), 0, True),
    ((1, 24, 16, 16), 0, True),
]


class AbsentGPU:
    """What Triton asks of a driver when it compiles."""

    def __init__(self, arch):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0


class Compiling:
    """Stands in for a kernel: compiles it where it would have been compiled or launched, which has to be the same."""

    def __init__(self, kernel, compiled):
        self.kernel, self.compiled = kernel, compiled

    def warmup(self, *arguments, grid, **options):
        self.compiled.append(self.kernel.warmup(*arguments, grid=grid, **options))

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.warmup(*arguments, grid=grid, **options)


@pytest.fixture
def compile_calls(monkeypatch):
    """A function that returns the kernels of a forward and a backward call, by name.

    What is launched is what was loaded before: a kernel that cannot be compiled is found out before anything has run.
    """

    def compile_calls(arch, layers, dtype=torch.float32, out_dtype=None, memory_format=None, offset=0):
        out_dtype = out_dtype or dtype
        compiled = []
        monkeypatch.setattr(launch, "_cache", prepared.Cache())
        for name, kernel in originals.items():
            monkeypatch.setattr(kernels, name, Compiling(kernel, compiled))
        driver.set_active(AbsentGPU(arch))  # for good: this process does nothing else
        _call(layers, dtype, out_dtype, memory_format, offset)
        by_name = {kernel.metadata.name: kernel for kernel in compiled}
        assert len({kernel.hash for kernel in compiled}) == len(by_name)
        return by_name

    names = ("forward_kernel", "registers_kernel", "backward_kernel", "table_kernel")
    originals = {name: getattr(kernels, name) for name in names}
    return compile_calls


def _call(layers, dtype, out_dtype, memory_format, offset):
    def tensor(shape, dtype):
        like = torch.empty(shape, device="meta")
        like = like.to(memory_format=memory_format) if memory_format and len(shape) == 4 else like
        return torch.empty(like.numel() + offset, dtype=dtype)[offset:].as_strided(shape, like.stride())

    shapes = [shape for shape, _, _ in layers]
    dims = [dim for _, dim, _ in layers]
    two_sided = [two for _, _, two in layers]
    compute_dtype = layout.compute_dtype(dtype)
    weights = [tensor(shape, dtype) for shape in shapes]
    outs = [tensor(shape, out_dtype) for shape in shapes]
    grads = [tensor(shape, out_dtype) for shape in shapes]
    grad_weights = [tensor(shape, dtype) for shape in shapes]
    vectors = [torch.empty(size, dtype=compute_dtype) for layer in layers for size in layout.vector_sizes(*layer)]
    batch = layout.Batch.of(weights, dims, two_sided)
    snapshot, sigma = (torch.empty(size, dtype=compute_dtype) for size in (batch.snapshot_size, len(layers)))
    laws = Laws.of([Law()] * len(layers))
    backend.forward(batch, weights, vectors, laws, 1e-12, 1, outs, snapshot, sigma)
    backend.backward(batch, grads, weights, list(range(len(layers))), laws, snapshot, sigma, grad_weights, None)


def resources(kernel, tmp_path):
    """(registers, bytes of stack) of a thread, from the machine code; registers that spill go to the stack."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups()
    return int(registers), int(stack) + int(local)


def check_resources(kernels_by_name, tmp_path, max_registers=128, forward="forward_kernel", spilled=0):
    assert set(kernels_by_name) == {forward, "backward_kernel", "table_kernel"}
    for name, kernel in kernels_by_name.items():
        registers, stack = resources(kernel, tmp_path)
        print(f"{name}: {registers} registers, {stack} bytes of stack")
        assert stack == (spilled if name == forward else 0), name
        assert registers <= (255 if name == "registers_kernel" else max_registers), name


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_spills(compile_calls, tmp_path, arch, dtype):
    check_resources(compile_calls(arch, RESNET, dtype), tmp_path)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("layers", "dtype", "out_dtype", "memory_format", "offset"),
    [
        (CNN, torch.float32, None, None, 0),
        (ODD, torch.float32, None, None, 0),
        (RESNET, torch.float32, None, torch.channels_last, 0),
        (RESNET, torch.float32, None, None, 1),
        (RESNET, torch.float32, torch.bfloat16, None, 0),
        (RESNET, torch.float64, None, None, 0),
    ],
    ids=["cnn", "odd", "channels_last", "unaligned", "autocast", "fp64"],
)
def test_no_spills_elsewhere(compile_calls, tmp_path, arch, layers, dtype, out_dtype, memory_format, offset):
    compiled = compile_calls(arch, layers, dtype, out_dtype, memory_format, offset)
    check_resources(compiled, tmp_path, max_registers=255 if dtype == torch.float64 else 128)


SMALL = {
    name: [(layer.shape, layer.dim, needs_two_sides(layer.shape)) for layer in load()[name].layers]
    for name in ("sngan_d32", "bsn_cnn_d32")
}
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}  # an A100, H100, B200, RTX 5090


@pytest.mark.parametrize(
    ("arch", "name", "dtype", "out_dtype", "offset"),
    [
        *((arch, "sngan_d32", torch.float32, None, 0) for arch in ARCHS),
        *((arch, "bsn_cnn_d32", torch.float32, None, 0) for arch in ARCHS if arch > 80),  # an A100 has no room for it
        (80, "sngan_d32", torch.bfloat16, None, 0),
        (90, "bsn_cnn_d32", torch.bfloat16, None, 0),
        (90, "sngan_d32", torch.float32, torch.bfloat16, 0),
        (90, "sngan_d32", torch.float32, None, 1),
        (90, "sngan_d32", torch.float64, None, 0),
    ],
)
def test_rows_stay_in_registers(compile_calls, tmp_path, monkeypatch, arch, name, dtype, out_dtype, offset):
    """None is spilled, but for a few bytes by Triton 3.4; such a GPU's number of multiprocessors asks for the tiles."""
    monkeypatch.setenv("BSSN_FAST_TRITON_PLAN", "registers")
    monkeypatch.setattr(launch, "MULTIPROCESSORS", MULTIPROCESSORS[arch])
    compiled = compile_calls(arch, SMALL[name], dtype, out_dtype, None, offset)
    more = 255 if dtype == torch.float64 else 128
    spilled = 24 if triton.__version__.startswith("3.4.") and (arch, dtype) == (80, torch.bfloat16) else 0
    check_resources(compiled, tmp_path, max_registers=more, forward="registers_kernel", spilled=spilled)


@pytest.mark.parametrize("arch", ARCHS)
def test_probe_has_what_the_kernels_rest_on(arch):
    driver.set_active(AbsentGPU(arch))
    text = kernels.probe_kernel.warmup(torch.int64, grid=(1,)).asm["ptx"]
    assert all(word in text for word in ("atom", "acquire", "release", "bar.sync"))


def wide(text, access):
    return len(re.findall(rf"\b{access}\.global\S*\.(v4\.b32|v2\.b64)", text))


@pytest.mark.parametrize(
    ("dtype", "memory_format"),
    [(torch.float32, None), (torch.float32, torch.channels_last), (torch.bfloat16, None)],
)
def test_wide_accesses(compile_calls, dtype, memory_format):
    """16 bytes a thread where weights are read and where results are written; none of that for unaligned weights."""
    layers = [((1024, 512, 3, 3), 0, False), ((1024, 512, 1, 1), 0, False)]
    for kernel in ("forward_kernel", "backward_kernel"):
        access = {
            offset: compile_calls(90, layers, dtype, None, memory_format, offset)[kernel].asm["ptx"]
            for offset in (0, 1)
        }
        aligned, unaligned = access[0], access[1]
        assert wide(aligned, "ld") >= wide(unaligned, "ld") + 4
        assert wide(aligned, "st") >= wide(unaligned, "st") + 2


@pytest.mark.parametrize("arch", ARCHS)
def test_waits_and_announcements(compile_calls, arch):
    for name, kernel in compile_calls(arch, RESNET).items():
        if name != "table_kernel":
            check_waits_and_announcements(kernel, 1, 1)


@pytest.mark.parametrize("arch", ARCHS)
def test_waits_and_announcements_where_rows_stay_in_registers(compile_calls, monkeypatch, arch):
    """After rows, kept or not, and after columns; before columns, vectors, and writing what was kept or was not."""
    monkeypatch.setenv("BSSN_FAST_TRITON_PLAN", "registers")
    kernel = compile_calls(arch, SMALL["sngan_d32"][2:4])["registers_kernel"]
    check_waits_and_announcements(kernel, 3, 8)


def check_waits_and_announcements(kernel, n_releases, most_acquires):
    """A barrier directly before each release, and each acquire repeated and followed by a barrier."""
    lines = [line.strip() for line in kernel.asm["ptx"].splitlines()]
    code = [line for line in lines if line and not line.startswith((".loc", "//", "$L__tmp"))]
    releases = [n for n, line in enumerate(code) if "release" in line]
    acquires = [n for n, line in enumerate(code) if "acquire" in line]
    assert len(releases) == n_releases
    assert 1 <= len(acquires) <= most_acquires
    for release in releases:
        barrier = max(n for n, line in enumerate(code[:release]) if line.startswith("bar.sync"))
        assert not any(re.search(r"\b(st|atom|red)\.", line) for line in code[barrier:release])
    for acquire in acquires:
        loop = max(n for n, line in enumerate(code[:acquire]) if re.match(r"\$L__BB\d+_\d+:", line))
        label = code[loop].split(":")[0]
        after = code[acquire:]
        back = next(n for n, line in enumerate(after) if re.search(rf"\bbra(\.uni)? *\t*{re.escape(label)};", line))
        assert any(line.startswith("bar.sync") for line in after[:back])


def test_a_launch_per_phase(compile_calls, tmp_path, monkeypatch):
    monkeypatch.setenv("BSSN_FAST_TRITON_LAUNCH", "phases")
    compiled = compile_calls(90, RESNET)
    check_resources(compiled, tmp_path)
    for kernel in compiled.values():
        assert not re.search(r"acquire|release|\batom\.", kernel.asm["ptx"])
