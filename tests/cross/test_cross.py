"""The CPU kernels compile, without a warning, for the platforms whose machines are not at hand.

Needs zig, which carries the headers of all of them: pip install 'bssn_fast[cross]'. The first run takes minutes, as zig
builds its C++ library for each platform.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
AVX512 += ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
TARGETS = (
    "x86_64-linux-gnu.2.28",
    "aarch64-linux-gnu.2.28",
    "aarch64-macos",
    "x86_64-windows-gnu",
    "aarch64-windows-gnu",
)

pytest.importorskip("ziglang", reason="ziglang is not installed")


@pytest.mark.skipif(sysconfig.get_platform() != "linux-x86_64", reason="Python's headers are those of this platform")
def test_the_whole_module_compiles_for_an_older_glibc(tmp_path: Path) -> None:
    """As CONTRIBUTING.md has `make wheel` do it."""
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", TARGETS[0]]
    flags = ["-O1", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{sysconfig.get_path('include')}"]
    command = [*compiler, *flags, "-c", str(CSRC / "bindings.cpp"), "-o", str(tmp_path / "object.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_compile(target: str, tmp_path: Path) -> None:
    variants = [["-DBSSN_ISA=portable"]]
    if target.startswith("x86_64"):
        variants = [["-DBSSN_ISA_LIST_X86=1", "-DBSSN_ISA=portable"]]
        variants.append([*variants[0][:1], "-DBSSN_ISA=avx512", *AVX512])
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", target]
    flags = ["-O1", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    sources = sorted((CSRC / "cpu").glob("*.cpp"))
    assert sources
    for source in sources:
        for variant in variants if source.name == "kernels.cpp" else variants[:1]:
            command = [*compiler, *flags, *variant, "-c", str(source), "-o", str(tmp_path / "object.o")]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
