"""`make gpu-prepare`: compiles, on a machine without a GPU, what `make gpu` on another one would begin by compiling.

    make gpu-prepare                                          for sm_90 (H100, H200), this Python and Python 3.12
    make gpu-prepare ARGS="--arch 100 --python 3.11 3.13"     for others

Needs nvcc, each of these Pythons and the Python package index. Leaves the modules in build/gpu: take that folder along.
They load on the other machine if its system library is not older than this one's; if they do not, it compiles.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import extension
from benchmarks.gpu.outcomes import ROOT

OWN = f"{sys.version_info.major}.{sys.version_info.minor}"


def interpreter(version: str) -> str | None:
    """Return a Python of this version that runs, or None. A version manager's command may be there without one."""
    if version == OWN:
        return sys.executable
    managed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for command in (f"python{version}", *map(str, managed)):
        found = shutil.which(command)
        if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
            return found
    return None


def compile_for(python: str, arch: str, target: Path) -> str:
    """Compile for one Python and one architecture; return what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        # A wheel, as pip brings what the build needs, and takes it away again.
        command = [python, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", folder, "."]
        environment = {**os.environ, "BSSN_FAST_CUDA_ARCHS": arch, "BSSN_FAST_CUDA": "1"}
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
            return "pip could not build it, see above"
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            modules = [name for name in packed.namelist() if name.startswith("bssn_fast/_C.")]
            if not modules or b"'cuda'" in packed.read("bssn_fast/_build_info.py").split(b"NOT_BUILT")[-1]:
                return packed.read("bssn_fast/_build_info.py").decode().split("SUMMARY: str = ")[-1].splitlines()[0]
            suffix = modules[0].removeprefix("bssn_fast/_C")
            unpacked = Path(packed.extract(modules[0], folder))
        extension.put(unpacked, target / extension.name(suffix))
    return f"compiled for sm_{arch}"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="90", help="compute capability without its point (%(default)s)")
    parser.add_argument("--python", nargs="+", default=list(dict.fromkeys([OWN, "3.12"])), help="versions of Python")
    args = parser.parse_args(words)
    shutil.rmtree(extension.PREPARED, ignore_errors=True)  # what is there may be of other sources
    compiled = 0
    for version in args.python:
        python = interpreter(version)
        found = compile_for(python, args.arch, extension.PREPARED) if python else "no such Python here"
        compiled += found.startswith("compiled")
        print(f"Python {version}: {found}", flush=True)
    return int(compiled == 0)


if __name__ == "__main__":
    sys.exit(main())
