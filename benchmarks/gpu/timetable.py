"""What `make gpu` runs and when. Stages follow one another, the steps of one stage run side by side.

Seconds are the most that a step may take in a run of MINUTES, and more in a longer one. Timings also take what earlier
stages have left of theirs; what is lacking in the end, a second run does.

Most of the tests' time is the compilers': Triton's kernels, some 300 at 2 to 25 seconds, and torch.compile's graphs.
What will be timed is compiled beside the tests, so that no core is idle then, and the GPU is not later.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.gpu.outcomes import ROOT
from benchmarks.gpu.process import Step

MINUTES = 9 + 1 / 3
PROFILED = ("sngan_d32", "bsn_resnet_d128")
SECTIONS = ("SpeedOfLight", "WarpStateStats", "MemoryWorkloadAnalysis", "InstructionStats", "LaunchStats", "Occupancy")
CORES = os.cpu_count() or 1
GROUPS = {  # of tests: which, number of workers, seconds for one test
    # With what concerns no backend. Three workers: two took 195 s for half as many tests, most of it for those of what
    # these kernels leave to Triton's.
    "cuda": ("not (triton or test_compile)", 3, 60),
    "triton": ("triton and not test_compile", max(2, CORES * 3 // 4), 180),
    "compiled": ("test_compile", max(2, CORES // 4), 180),
}
SANITIZERS = {  # with their options, and the backends they look at
    "memcheck": (["--report-api-errors", "no"], ["triton", "cuda"]),  # torch asks questions whose answer is an error
    "racecheck": ([], ["cuda"]),  # Triton lets threads that hold copies of a number all write it
}
TOOLS = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*", "/usr/local/cuda*/bin")
"""Where NVIDIA's tools may be, beside the PATH."""
CACHES = ROOT / "build" / "gpu-caches"
ENVIRONMENT = {
    # Where each step finds what another one has compiled.
    "TRITON_CACHE_DIR": str(CACHES / "triton"),
    "TORCHINDUCTOR_CACHE_DIR": str(CACHES / "inductor"),
    # torch's profiler stays in the process: taken down and up again it is known to crash with CUDA graphs.
    "TEARDOWN_CUPTI": "0",
}
"""Of all steps."""
FEW = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
"""For steps with processes enough of their own: torch.compile would start one for each core in each of them."""


@dataclass(frozen=True)
class Files:
    """Where the steps read and write."""

    output: Path  # what is left in the end
    scratch: Path  # what is not
    machine: str

    @property
    def not_again(self) -> Path:
        """Names of the tests that are not to run, one a line."""
        return self.scratch / "not_again.txt"

    @property
    def first(self) -> Path:
        """Names of the tests that come before all others, likewise."""
        return self.scratch / "first.txt"


def stages(files: Files) -> list[list[Step]]:
    """Return all stages: tests first, then the GPU alone for all timings, then what tells more about fewer cases."""
    found = [
        [Step("extension", _python("benchmarks.gpu.extension", files.output), 200), names(files)],
        [*(tests(group, files, 205) for group in GROUPS), *compilers(files, 205)],
        [measurements("measurements", files, 155)],
        [measurements("compiled peers", files, 80, "--compiled")],
        *([profile(name)] for name in PROFILED),
        [*map(sanitizer, SANITIZERS), *(tests(group, files, 300) for group in GROUPS)],
    ]
    return [
        [replace(step, environment=ENVIRONMENT | step.environment) for step in stage if step is not None]
        for stage in found
    ]


def chosen(stages: Sequence[Sequence[Step]], words: Sequence[str]) -> tuple[list[list[Step]], str | None]:
    """Return the first stage, and of the others the steps whose names are among the words or begin with one.

    Without words all of them; the second result is what is wrong with the words.
    """
    if not words:
        return [list(stage) for stage in stages], None
    known = list(dict.fromkeys(step.name for stage in stages[1:] for step in stage))
    unknown = [word for word in words if not any(_is_named(name, word) for name in known)]
    problem = f"no step is called {' or '.join(unknown)}; there are: {', '.join(known)}" if unknown else None
    later = [[step for step in stage if any(_is_named(step.name, word) for word in words)] for stage in stages[1:]]
    return [list(stages[0]), *later], problem


def _is_named(name: str, word: str) -> bool:
    return f"{name} ".startswith(f"{word} ")


def compilers(files: Files, seconds: float) -> list[Step]:
    """Return the steps that compile what the timings will find: a few each, as many at once as there are cores."""
    from benchmarks.timing.gpu_plan import SETS, VARIANTS  # which need torch

    units = [f"{name} {variant}" for name in SETS for variant in VARIANTS]
    command = _python("benchmarks.gpu.compile_peers", "--machine", files.machine, files.output)
    return [Step(f"compile {what}", [*command, what], seconds, FEW) for what in [*units, "host"]]


def names(files: Files) -> Step:
    """Return the step that lists all tests, those of backends that do not work here too."""
    command = _pytest(files, "--collect-only", "tests/gpu")
    return Step("names", command, 90, {"CUDA_VISIBLE_DEVICES": ""})


def tests(group: str, files: Files, seconds: float) -> Step:
    """Return the step that runs a group's tests, in workers: one that dies or hangs is replaced, and names its test."""
    which, workers, limit = GROUPS[group]
    parallel = ["-n", str(workers), "--maxschedchunk", "1", "--max-worker-restart", "40"]
    limits = ["--timeout", str(limit), "--timeout-method", "thread"]
    return Step(f"tests {group}", _pytest(files, *parallel, *limits, "-k", which, "tests/gpu"), seconds, FEW)


def measurements(name: str, files: Files, seconds: float, *options: str) -> Step:
    """Return the step that times what has not been timed yet."""
    command = _python("benchmarks.gpu.measurements", "--machine", files.machine, files.output, *options)
    return Step(name, command, seconds, persists=True)


def profile(name: str) -> Step | None:
    """Return the step that asks the profiler about a forward and a backward of one layer set, if it is installed."""
    tool = _tool("ncu")
    if tool is None:
        return None
    sections = [word for section in SECTIONS for word in ("--section", section)]
    options = ["--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw", *sections]
    return Step(f"profile {name}", [tool, *options, *_python("benchmarks.gpu.profiled", name)], 30)


def sanitizer(name: str) -> Step | None:
    """Return the step that looks for wrong addresses or races in a small program, if the sanitizer is installed."""
    tool = _tool("compute-sanitizer")
    if tool is None:
        return None
    options, backends = SANITIZERS[name]
    program = [sys.executable, "tests/gpu/sanitized.py", *backends]
    command = [tool, "--tool", name, *options, "--error-exitcode", "9", *program]
    return Step(name, command, 240, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def missing_tools() -> list[str]:
    """Return the names of NVIDIA's tools that are not installed: their steps are left out."""
    return [name for name in ("ncu", "compute-sanitizer") if _tool(name) is None]


def _tool(name: str) -> str | None:
    places = [path for folder in TOOLS for path in sorted(glob.glob(f"{folder}/{name}"), reverse=True)]
    return next(filter(None, map(shutil.which, (name, *places))), None)


def _python(module: str, *words: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, words)]


def _pytest(files: Files, *words: str) -> list[str]:
    options = ["-q", "-ra", "--confcutdir=tests/gpu", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.pytest_plugin"]
    ours = ["--outcomes", files.output, "--machine", files.machine]
    lists = ["--not-again", files.not_again, "--first", files.first]
    return _python("pytest", *options, *ours, *lists, *words)
