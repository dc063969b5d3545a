"""A plugin of pytest: leaves out tests that need not run again, and appends the others' outcomes as they come."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.against.peers import PLANS
from benchmarks.gpu import outcomes


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu")
    group.addoption("--outcomes", type=Path, help="folder of the outcomes")
    group.addoption("--machine", help="name of the machine, part of the sources' hash")
    group.addoption("--not-again", type=Path, help="file with names of tests that are left out")
    group.addoption("--first", type=Path, help="file with names of tests that come first")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # one of xdist's workers, whose outcomes the first process hears of
        config.pluginmanager.register(Outcomes(config))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what need not run again. First comes what failed before, whatever else the time is enough for.

    Plans that are not the default come last: where one of them hangs, each of its tests takes the time of hundreds.
    In between, what Triton compiles longest is first, or one worker would end last.
    """
    only_names = config.getoption("collectonly")
    done = set() if only_names else _names(config.getoption("not_again"))
    first = _names(config.getoption("first"))
    left_out = [item for item in items if item.nodeid in done]
    rest = (item for item in items if item.nodeid not in done)

    def place(item: pytest.Item) -> tuple[bool, bool, bool]:
        is_plan = any(f"{backend}-{plan}" in item.nodeid for backend, plans in PLANS.items() for plan in plans)
        return item.nodeid not in first, is_plan, "::test_matrix[" not in item.nodeid

    items[:] = sorted(rest, key=place)
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def _names(file: Path | None) -> set[str]:
    """Return the names in a file, which is the same for all of xdist's workers, whenever they begin."""
    return set(file.read_text().splitlines()) if file is not None and file.exists() else set()


class Outcomes:
    """Appends what becomes of each test."""

    def __init__(self, config: pytest.Config) -> None:
        self._file = config.getoption("outcomes") / outcomes.FILE
        self._machine = config.getoption("machine")
        self._only_names = config.getoption("collectonly")
        self._failed: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if self._only_names:
            outcomes.append(self._file, "tests", names=[item.nodeid for item in session.items])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what the test itself became, and whatever went wrong before, after, or by the end of its process."""
        if report.passed and report.when != "call":
            return
        if report.nodeid in self._failed:
            return  # the process that ran it has given up
        if report.failed:
            self._failed.add(report.nodeid)
        outcomes.append(
            self._file,
            "test",
            name=report.nodeid,
            outcome=report.outcome,
            seconds=round(report.duration, 2),
            why=_why(report),
            sources=outcomes.sources_of_test(report.nodeid, self._machine),
        )

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK  # all of them had run


def _why(report: pytest.TestReport) -> str:
    """Return the error's first line, or the reason of a skip."""
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):
        text = report.longrepr[-1]
    else:
        text = getattr(getattr(report.longrepr, "reprcrash", None), "message", None) or str(report.longrepr)
    return text.strip().splitlines()[0][:300]
