"""`make gpu`: correctness and speed on this machine's GPU, offline, in one folder.

Builds the extension where nvcc is, runs the GPU tests, compute-sanitizer on a small program if it is installed, and the
benchmarks with hot and cold caches; leaves logs, JSON, tables and plots in benchmarks/results/<gpu>/. Takes about ten
minutes. Uses the Python that runs it and the torch that is there; installs nothing.

    python3 benchmarks/gpu.py                   everything
    python3 benchmarks/gpu.py build tests       some of the steps: build, tests, sanitizer, benchmarks, modes
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SETS = ("bsn_cnn_d32", "sngan_d32", "bsn_resnet_d128", "biggan_d128")
COMPILED = ("torch.compile", "torch.compile reduce-overhead")


@dataclass
class Run:
    """The steps' common folder, and what they have left undone."""

    folder: Path
    lines: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)

    def call(self, name: str, command: list[str], minutes: float, **environment: str) -> bool:
        """Run a command with its output in `<name>.log`; True if it succeeded in time."""
        log = self.folder / f"{name}.log"
        start = time.perf_counter()
        with log.open("w") as file:
            file.write(" ".join(command) + "\n")
            file.flush()
            try:
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=60 * minutes,
                    check=False,
                ).returncode
                outcome = "done" if code == 0 else f"failed with exit status {code}"
            except subprocess.TimeoutExpired:
                code, outcome = 124, f"stopped after {minutes:g} minutes"
        self.note(f"{name}: {outcome} in {time.perf_counter() - start:.0f} s")
        if code:
            self.failed.append(name)
            print("".join(f"    {line}\n" for line in log.read_text().splitlines()[-15:]))
        return code == 0


def build(run: Run) -> None:
    """Build the CUDA kernels for this GPU alone; without nvcc or pybind11 Triton is measured by itself."""
    import torch

    missing = [name for name in ("pybind11", "setuptools") if importlib.util.find_spec(name) is None]
    if missing:
        run.note(f"build: left out, {' and '.join(missing)} not installed")
        return
    major, minor = torch.cuda.get_device_capability()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    run.call("build", command, 5, BSSN_FAST_CUDA_ARCHS=f"{major}{minor}")


def tests(run: Run) -> None:
    """The GPU tests, in several processes where pytest-xdist is there: most of their time is Triton compiling."""
    if importlib.util.find_spec("pytest") is None:
        run.note("tests: left out, pytest is not installed")
        run.failed.append("tests")
        return
    parallel = []
    if importlib.util.find_spec("xdist") is not None:
        parallel = ["-n", str(max(1, min(12, (os.cpu_count() or 2) - 2)))]
    options = ["-q", "-ra", "--confcutdir=tests/gpu", "-p", "no:cacheprovider"]
    run.call("tests", [sys.executable, "-m", "pytest", *options, *parallel, "tests/gpu"], 8)


def sanitizer(run: Run) -> None:
    """compute-sanitizer: addresses, races in shared memory and use of barriers."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        run.note("sanitizer: left out, compute-sanitizer is not installed")
        return
    program = [sys.executable, "tests/gpu/sanitized.py"]
    if not run.call("sanitized", program, 3):
        return
    for check in ("memcheck", "racecheck", "synccheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", *program]
        run.call(check, command, 4, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def report(run: Run, name: str, *options: str, minutes: float = 6, **environment: str) -> None:
    command = [sys.executable, "-m", "benchmarks.report", "--device", "cuda", *options]
    run.call(name, command, minutes, **environment)


def benchmarks(run: Run) -> None:
    """All layer sets against all peers; torch.compile, which takes minutes to compile, on four sets only."""
    output = ("--output", str(run.folder))
    report(run, "benchmarks", "--parts", "layers", "--seconds", "1", "--without", *COMPILED, *output)
    parts = ("linear", "conv", "gan")
    report(run, "benchmarks_grid_and_gan", "--parts", *parts, "--seconds", "1", "--without", *COMPILED, *output)
    report(
        run, "benchmarks_compiled", "--parts", "layers", "--seconds", "0.5", "--sets", *SETS[:2], SETS[3],
        "--peers", COMPILED[1], *output,
    )  # fmt: skip


def modes(run: Run) -> None:
    """One launch against one launch per phase, with nothing else changed."""
    for mode in ("single", "phases"):
        options = ("--parts", "layers", "--seconds", "0.5", "--sets", *SETS, "--peers", "bssn_fast triton")
        output = ("--output", str(run.folder / mode))
        report(run, mode, *options, *output, minutes=3, BSSN_FAST_TRITON_LAUNCH=mode)


STEPS: dict[str, Callable[[Run], None]] = {step.__name__: step for step in (build, tests, sanitizer, benchmarks, modes)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="step", help=", ".join(STEPS))
    chosen = parser.parse_args().steps or list(STEPS)
    unknown = [step for step in chosen if step not in STEPS]
    if unknown:
        parser.error(f"there is no step {unknown[0]}; choose from {', '.join(STEPS)}")
    if importlib.util.find_spec("torch") is None:
        sys.exit(f"{sys.executable} has no torch: run `make gpu PYTHON=...` with a Python that has torch with CUDA")
    import torch

    if not torch.cuda.is_available():
        sys.exit(
            f"torch {torch.__version__} of {sys.executable} finds no GPU here: run `make gpu` on a machine with one, "
            "or `make gpu PYTHON=...` with a Python whose torch was built for it"
        )
    from benchmarks import machine

    about = machine.describe("cuda")
    run = Run(ROOT / "benchmarks" / "results" / machine.key(about))
    run.folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for name, value in about.items():
        run.note(f"{name}: {value}")
    for step in chosen:
        STEPS[step](run)
    run.note(f"{time.perf_counter() - start:.0f} s in all; {', '.join(run.failed) or 'nothing'} failed")
    (run.folder / "summary.txt").write_text("\n".join(run.lines) + "\n")
    print(f"results: {run.folder.relative_to(ROOT)}")
    return int(bool(run.failed))


if __name__ == "__main__":
    sys.exit(main())
