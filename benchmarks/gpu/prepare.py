"""`make gpu-prepare`: compiles, on a machine without a GPU, what `make gpu` on another one would begin by compiling.

    make gpu-prepare                     for sm_90 (H100, H200)
    make gpu-prepare ARGS="--arch 100"   for others

Needs nvcc and the Python package index. Leaves the module in build/gpu: take that folder along. It loads in every
Python from 3.10 on, if the other machine's system library is not older than this one's; else that machine compiles.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import extension
from benchmarks.gpu.outcomes import ROOT


def compile_for(arch: str, target: Path) -> str:
    """Compile for one architecture; return what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        # A wheel, as pip brings what the build needs, and takes it away again.
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", folder, "."]
        environment = {**os.environ, "BSSN_FAST_CUDA_ARCHS": arch, "BSSN_FAST_CUDA": "1"}
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
            return "pip could not build it, see above"
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            module = f"bssn_fast/_C{extension.SUFFIX}"
            about = packed.read("bssn_fast/_build_info.py").decode()
            if module not in packed.namelist() or "'cuda'" in about.split("NOT_BUILT")[-1]:
                return about.split("SUMMARY: str = ")[-1].splitlines()[0]
            unpacked = Path(packed.extract(module, folder))
        extension.put(unpacked, target / extension.name())
    return f"compiled for sm_{arch}"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="90", help="compute capability without its point (%(default)s)")
    args = parser.parse_args(words)
    for earlier in extension.PREPARED.glob(f"extension-*{extension.SUFFIX}"):  # of other sources, maybe
        earlier.unlink()
    found = compile_for(args.arch, extension.PREPARED)
    print(found, flush=True)
    return int(not found.startswith("compiled"))


if __name__ == "__main__":
    sys.exit(main())
