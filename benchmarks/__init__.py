"""Speed, in the order in which one would ask: what is measured, against whom, how, and how it is shown.

    work/      sets of layers, the problem and its right answer, whole training steps
    against/   the peers
    timing/    clocks, the machine, peers taking turns
    shown/     kept results, aims, tables, plots, pages
    results/   what was measured so far, a folder for each machine

    report.py           `make bench`: measures, keeps, shows
    gpu/                `make gpu`: tests and measures on a GPU in one run of nine minutes
    test_*.py           the same cases by pytest-benchmark
    gradient_groups.py  what docs/howto/distributed.md says of gradient groups

`docs/performance.md` explains the method.
"""
