"""`make gpu`: correctness and speed on this machine's GPU, offline, in one folder.

Builds the extension where nvcc is, runs the GPU tests, compute-sanitizer on a small program if it is installed, and the
benchmarks with hot and cold caches; leaves logs, JSON, tables and plots in benchmarks/results/<gpu>/. Ends within ten
minutes: what does not fit is left out, and said so; the most telling comes first. Uses the Python that runs it and the
torch that is there; installs nothing.

    python3 benchmarks/gpu.py                   everything
    python3 benchmarks/gpu.py build modes       some of the steps: build, correctness, modes, benchmarks, more
    python3 benchmarks/gpu.py --minutes 30      with more time
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SETS = ("bsn_cnn_d32", "sngan_d32", "bsn_resnet_d128", "biggan_d128")
FEWEST_SECONDS = 10
COMPILED = ("torch.compile", "torch.compile reduce-overhead")


@dataclass
class Run:
    """The steps' common folder, and what they have left undone."""

    folder: Path
    deadline: float = float("inf")  # by time.perf_counter
    lines: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)

    def call(self, name: str, command: list[str], minutes: float, **environment: str) -> bool:
        """Run a command with its output in `<name>.log`; True if it succeeded in time."""
        log = self.folder / f"{name}.log"
        start = time.perf_counter()
        seconds = min(60 * minutes, self.deadline - start)
        if seconds < FEWEST_SECONDS:
            self.note(f"{name}: left out, the time is up")
            self.failed.append(name)
            return False
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("w") as file:
            file.write(" ".join(command) + "\n")
            file.flush()
            try:
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=seconds,
                    check=False,
                ).returncode
                outcome = "done" if code == 0 else f"failed with exit status {code}"
            except subprocess.TimeoutExpired:
                code, outcome = 124, f"stopped after {seconds:.0f} s"
        self.note(f"{name}: {outcome} in {time.perf_counter() - start:.0f} s")
        if code:
            self.failed.append(name)
            print("".join(f"    {line}\n" for line in log.read_text().splitlines()[-15:]))
        return code == 0


def build(run: Run) -> None:
    """Build the CUDA kernels for this GPU alone; without nvcc or pybind11 Triton is measured by itself."""
    import torch

    needed = ("pybind11", "setuptools", "ninja")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        run.note(f"build: left out, {' and '.join(missing)} not installed")
    else:
        major, minor = torch.cuda.get_device_capability()
        environment = {"BSSN_FAST_CUDA_ARCHS": f"{major}{minor}"}
        usual = Path("/usr/local/cuda")
        if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ and (usual / "bin" / "nvcc").exists():
            environment["CUDA_HOME"] = str(usual)
        run.call("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 4, **environment)
    if run.call("backends", [sys.executable, "-m", "bssn_fast"], 1):
        for line in (run.folder / "backends.log").read_text().splitlines():
            if line.startswith("cuda "):
                run.note(line)


def correctness(run: Run) -> None:
    """The GPU tests and compute-sanitizer, at the same time."""
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(step, run) for step in (tests, sanitizer)]:
            done.result()


def tests(run: Run) -> None:
    """The GPU tests, in several processes where pytest-xdist is there: most of their time is Triton compiling."""
    if importlib.util.find_spec("pytest") is None:
        run.note("tests: left out, pytest is not installed")
        run.failed.append("tests")
        return
    parallel = []
    if importlib.util.find_spec("xdist") is not None:
        parallel = ["-n", str(max(1, min(12, (os.cpu_count() or 2) - 4)))]
    options = ["-q", "-ra", "--confcutdir=tests/gpu", "-p", "no:cacheprovider"]
    run.call("tests", [sys.executable, "-m", "pytest", *options, *parallel, "tests/gpu"], 4)


CHECKS = {  # of compute-sanitizer, with their options
    "memcheck": ("--report-api-errors", "no"),  # torch asks questions whose answer is an error
    "racecheck": (),
    "initcheck": (),
    "synccheck": (),
}


def sanitizer(run: Run) -> None:
    """compute-sanitizer: addresses, races in shared memory, memory that nobody has written, use of barriers."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        run.note("sanitizer: left out, compute-sanitizer is not installed")
        return
    program = [sys.executable, "tests/gpu/sanitized.py"]
    if not run.call("sanitized", program, 3):  # compiles too, so that the tools below find it done
        return

    def check(name: str) -> bool:
        command = [tool, "--tool", name, *CHECKS[name], "--error-exitcode", "9", *program]
        return run.call(name, command, 4, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    with ThreadPoolExecutor(len(CHECKS)) as pool:
        list(pool.map(check, CHECKS))


def report(run: Run, name: str, *options: str, minutes: float = 6, **environment: str) -> None:
    command = [sys.executable, "-m", "benchmarks.report", "--device", "cuda", *options]
    run.call(name, command, minutes, **environment)


WAYS = {  # of launching: name of the results' folder, peer, what is set
    "triton-single": ("bssn_fast triton", {"BSSN_FAST_TRITON_LAUNCH": "single"}),
    "triton-phases": ("bssn_fast triton", {"BSSN_FAST_TRITON_LAUNCH": "phases"}),
    "cuda-single": ("bssn_fast cuda", {"BSSN_FAST_CUDA_LAUNCH": "single"}),
    "cuda-phases": ("bssn_fast cuda", {"BSSN_FAST_CUDA_LAUNCH": "phases"}),
}


def modes(run: Run) -> None:
    """Every way of launching, with nothing else changed, and a table of them."""
    options = ("--parts", "layers", "--variants", "bssn", "--seconds", "0.3", "--sets", *SETS)
    for name, (peer, environment) in WAYS.items():
        output = ("--output", str(run.folder / name))
        report(run, name, *options, "--peers", peer, *output, minutes=1.5, **environment)
    for line in comparison(run.folder):
        run.note(line)


def comparison(folder: Path) -> list[str]:
    """Return the lines of a table: microseconds, and forward in units of its floor, per set and way."""
    from benchmarks import results

    lines = [
        "| set | caches | way | forward, µs | of the floor | backward, µs | of the floor |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {name: results.load(folder / name) for name in WAYS if (folder / name / results.JSON).exists()}
    for chosen in SETS:
        for caches in ("hot", "cold"):
            for name, measured in found.items():
                pair = [measured.find("layers", chosen, "bssn", WAYS[name][0], phase, caches) for phase in FLOORS]
                if all(pair):
                    cells = [f"{1e3 * r.median:.1f} | {r.copies / FLOORS[r.phase]:.2f}" for r in pair if r]
                    lines.append(f"| {chosen} | {caches} | {name} | {' | '.join(cells)} |")
    return lines


FLOORS = {"forward": 1.5, "backward": 2.0}
"""Least traffic, 2 reads and 1 write or 3 reads and 1 write, in plain copies, which are 1 read and 1 write."""


def benchmarks(run: Run) -> None:
    """The sets that targets are set for, against the peers that they name, then torch.compile and the other sets."""
    output = ("--output", str(run.folder))
    first = ("--parts", "layers", "--sets", *SETS)
    without = ("--without", *COMPILED)
    report(run, "benchmarks", *first, "--seconds", "0.5", *without, *output, minutes=3)
    report(run, "host", "--parts", "linear", "--sets", "linear-20x4", "--seconds", "2", *without, *output, minutes=1)
    compiled = ("--variants", "sn", "--seconds", "0.5", "--peers", COMPILED[1])
    report(run, "benchmarks_compiled", *first[:3], *SETS[:2], SETS[3], *compiled, *output, minutes=2)


def more(run: Run) -> None:
    """Whole training steps, the synthetic grid and the remaining sets, as far as time allows."""
    output = ("--output", str(run.folder))
    without = ("--without", *COMPILED)
    report(run, "benchmarks_gan", "--parts", "gan", "--seconds", "1", *without, *output, minutes=1)
    others = [name for name in layer_set_names() if name not in SETS]
    report(run, "benchmarks_others", "--parts", "layers", "--sets", *others, "--seconds", "0.5", *without, *output)
    report(run, "benchmarks_grid", "--parts", "linear", "conv", "--seconds", "1", *without, *output)


def layer_set_names() -> list[str]:
    from benchmarks import layer_sets

    return list(layer_sets.load())


STEPS: dict[str, Callable[[Run], None]] = {
    step.__name__: step for step in (build, correctness, modes, benchmarks, more)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="step", help=", ".join(STEPS))
    parser.add_argument("--minutes", type=float, default=9.5, help="when to end (%(default)s)")
    args = parser.parse_args()
    chosen = args.steps or list(STEPS)
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
    start = time.perf_counter()
    run = Run(ROOT / "benchmarks" / "results" / machine.key(about), start + 60 * args.minutes)
    run.folder.mkdir(parents=True, exist_ok=True)
    for name, value in about.items():
        run.note(f"{name}: {value}")
    for step in chosen:
        STEPS[step](run)
        (run.folder / "summary.txt").write_text("\n".join(run.lines) + "\n")
    run.note(f"{time.perf_counter() - start:.0f} s in all; {', '.join(run.failed) or 'nothing'} failed or left out")
    (run.folder / "summary.txt").write_text("\n".join(run.lines) + "\n")
    print(f"results: {run.folder.relative_to(ROOT)}")
    return int(bool(run.failed))


if __name__ == "__main__":
    sys.exit(main())
