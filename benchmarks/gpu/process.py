"""One command with a time limit. What it has started ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from benchmarks.gpu.outcomes import ROOT

FINISHED = 3
"""Exit status of a program that has done what it could, though not all of it succeeded."""


@dataclass(frozen=True)
class Step:
    """A command, how many seconds it may take, and what is set in its environment.

    `persists`: started again, it goes on where it was, as is done if it ends with another status than 0 and FINISHED.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    persists: bool = False


class Running:
    """A step under way, the first process of a group of its own; its output goes to a log.

    It ends when its seconds are over, but not before the moment `at_least`; at the moment `deadline` whatever they are.
    """

    MOST_STARTS = 6

    def __init__(self, step: Step, log: Path, deadline: float, at_least: float = 0.0) -> None:
        self.step = step
        self._log, self._began, self._starts = log, monotonic(), 0
        self._end = min(max(self._began + step.seconds, at_least), deadline)
        self.outcome: str | None = None
        self._start()

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return monotonic() - self._began

    def _start(self) -> None:
        self._starts += 1
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._log.open("a") as out:
            out.write(" ".join(self.step.command) + "\n")
            out.flush()
            self._process = subprocess.Popen(
                self.step.command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **self.step.environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> bool:
        """Look how it stands; True once it has ended, and `outcome` says how."""
        status = self._process.poll()
        if status is None:
            if monotonic() < self._end:
                return False
            self.end()
            self.outcome = f"stopped after {self.seconds:.0f} s"
            return True
        self.end()  # what it has left running
        again = self.step.persists and status not in (0, FINISHED) and self._starts < self.MOST_STARTS
        if again and monotonic() < self._end:
            self._start()
            return False
        self.outcome = "done" if status == 0 else f"failed with exit status {status}"
        return True

    def end(self) -> None:
        """End the process and its group."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
