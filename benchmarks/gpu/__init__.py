"""`make gpu`: everything that needs a GPU, in one run of nine minutes that a second run continues.

    __main__.py       the run: stages one after another, files at the end
    timetable.py      what runs when, and for how long at most
    process.py        one command with its time limit, ended with all that it has started
    outcomes.py       the file to which every outcome and figure is appended as it comes, and what need not run again
    pytest_plugin.py  leaves out tests that have passed, appends the others' outcomes
    extension.py      what `make gpu-prepare` has compiled is tried, else compiled here
    prepare.py        `make gpu-prepare`, on a machine without a GPU
    compile_peers.py  compiles what will be timed, while tests run
    compile_once.py   no two processes compile the same kernel of Triton's at once
    measurements.py   all timings, in one process that has the GPU to itself
    profiled.py       what the profiler looks at
    files.py          the few files that are left

Imports all of the other folders.
"""
