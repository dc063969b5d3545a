"""The compiled module for this machine's GPU: one that was compiled before is tried, else it is built here.

    python -m benchmarks.gpu.extension FOLDER     a copy of what works is left in FOLDER, for later runs

Compiled modules have a hash of the sources in their names, so that none is taken for another version's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.outcomes import ROOT

PREPARED = ROOT / "build" / "gpu"
BUILDS_NEED = ("setuptools", "ninja")
SUFFIX = ".abi3.so"
TRY = """
import sys
from bssn_fast import backends
reason = backends.why_unavailable("cuda", "cuda")
print(reason or "the CUDA kernels work")
sys.exit(reason is not None)
"""


def name() -> str:
    """Return the file name of a module compiled from the sources as they are."""
    digest = hashlib.sha256()
    for path in [ROOT / "setup.py", *sorted((ROOT / "csrc").rglob("*"))]:
        if path.is_file():
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return f"extension-{digest.hexdigest()[:16]}{SUFFIX}"


def compiled_before(output: Path) -> Iterator[Path]:
    """Yield modules of these sources, from `make gpu-prepare` and earlier runs."""
    wanted = name()
    for folder in (PREPARED, output, *(ROOT / "benchmarks" / "results").glob("*/*")):
        if (folder / wanted).exists():
            yield folder / wanted


def installed() -> Path:
    """Return where Python looks for the module."""
    return ROOT / "bssn_fast" / f"_C{SUFFIX}"


def put(source: Path, target: Path) -> None:
    """Copy a module. Whoever has loaded an earlier one keeps that."""
    if source.resolve() != target.resolve():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"{target.name}.new")
        shutil.copy2(source, unfinished)
        os.replace(unfinished, target)


def works() -> bool:
    """Whether the module loads and its kernels are for this GPU, as another process finds, which may die of it."""
    try:
        return subprocess.run([sys.executable, "-c", TRY], cwd=ROOT, timeout=60, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def build() -> str | None:
    """Compile for this GPU alone; return why that cannot be done."""
    missing = [module for module in BUILDS_NEED if importlib.util.find_spec(module) is None]
    if missing:
        return f"not built: {' and '.join(missing)} not installed"
    import torch

    environment = {**os.environ, "BSSN_FAST_CUDA_ARCHS": "{}{}".format(*torch.cuda.get_device_capability())}
    usual = Path("/usr/local/cuda")
    if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ and (usual / "bin" / "nvcc").exists():
        environment["CUDA_HOME"] = str(usual)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    return f"not built: setup.py ended with {status}" if status else None


def main() -> int:
    output = Path(sys.argv[1])
    for path in compiled_before(output):
        put(path, installed())
        print(f"trying {re.sub(f'^{ROOT}/', '', str(path))}", flush=True)
        if works():
            put(path, output / path.name)
            return 0
    problem = build()
    if problem is not None:
        print(problem)
        return 1
    if not works():
        return 1
    for folder in (PREPARED, output):
        put(installed(), folder / name())
    return 0


if __name__ == "__main__":
    sys.exit(main())
