"""Programs of one launch at the same time, in Triton's interpreter, which by itself runs one after the other.

Each program is a thread, of which one runs at a time; another one may go on wherever a program draws a ticket or waits.
"""

import ctypes
import inspect
import random
import threading

import triton.language as tl
from triton.runtime.interpreter import GridExecutor

from bssn_fast.backends.triton import kernels, tiles

LANGUAGE = tl  # which the interpreter looks for in this module
KERNEL, DRAW = kernels.registers_kernel, kernels.draw
WRITE_KEPT, WRITE_DROPPED = kernels.write_kept, kernels.write_dropped


def number(x):
    """A scalar of the interpreter, or a plain number."""
    return int(x.handle.data[0]) if hasattr(x, "handle") else int(x)


def has_reached(counter, target):
    return ctypes.c_int64.from_address(number(counter)).value >= number(target)


def wait_in_order(counter, target):
    """In place of `wait_for` where programs run in the order of their numbers: what they wait for has to be there."""
    assert has_reached(counter, target), "a tile waits for one with a larger number"


class Program:
    """A thread that runs from `go_on` until it comes to the next place where another program may go on."""

    def __init__(self, run):
        self.can_go_on = lambda: True
        self.finished = False
        self.error = None
        self.ended_early = False
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(run,), daemon=True)
        self._thread.program = self
        self._thread.start()

    def _run(self, run):
        self._turn.acquire()
        try:
            if not self.ended_early:
                run()
        except BaseException as error:
            self.error = error
        self.finished = True
        self._back.release()

    def go_on(self):
        self._turn.release()
        self._back.acquire()

    def end(self):
        """Take the thread back, wherever it is."""
        self.ended_early = True
        if not self.finished:
            self.go_on()
        self._thread.join()

    def let_others_run(self, until=lambda: True):
        self.can_go_on = until
        self._back.release()
        self._turn.acquire()
        if self.ended_early:
            raise SystemExit


class Concurrent:
    """Stands in for `registers_kernel`: `resident` programs are there at a time, the next comes when one has finished.

    They go on in an order that the seed has, or, without one, by turns. `launches`, and how many tiles were written
    from registers (`kept`) and after another look (`dropped`), are counted.
    """

    def __init__(self, monkeypatch, resident, seed=None):
        self.resident, self.random = resident, None if seed is None else random.Random(seed)
        self.launches = self.kept = self.dropped = 0

        def draw_after_others(counters, end):
            threading.current_thread().program.let_others_run()
            return DRAW(counters, end)

        def wait(counter, target):
            if not has_reached(counter, target):
                threading.current_thread().program.let_others_run(lambda: has_reached(counter, target))

        def write_kept(*arguments):
            self.kept += 1
            WRITE_KEPT(*arguments)

        def write_dropped(*arguments):
            self.dropped += 1
            WRITE_DROPPED(*arguments)

        monkeypatch.setattr(kernels, "registers_kernel", self)
        monkeypatch.setattr(kernels, "write_kept", write_kept)
        monkeypatch.setattr(kernels, "write_dropped", write_dropped)
        monkeypatch.setattr(kernels, "draw", draw_after_others)
        for module in (kernels, tiles):
            monkeypatch.setattr(module, "wait_for", wait)

    def warmup(self, *arguments, **options):
        return None

    def __getitem__(self, grid):
        calls = []

        def collect(**arguments):
            calls.append(arguments)
            if len(calls) == grid[0]:
                self.launches += 1
                self.run(calls)

        collect.__annotations__ = KERNEL.fn.__annotations__
        collect.__signature__ = inspect.signature(KERNEL.fn)
        return GridExecutor(collect, KERNEL.arg_names, grid)

    def run(self, calls):
        coming = [lambda arguments=arguments: KERNEL(**arguments) for arguments in calls]
        running = []
        try:
            while coming or running:
                while coming and len(running) < self.resident:
                    running.append(Program(coming.pop(0)))
                able = [program for program in running if program.can_go_on()]
                assert able, "all programs wait, and none can go on"
                chosen = self.random.choice(able) if self.random else able[0]
                running.remove(chosen)
                chosen.go_on()
                if chosen.error is not None:
                    raise chosen.error
                if not chosen.finished:
                    running.append(chosen)
        finally:
            for program in running:
                program.end()
