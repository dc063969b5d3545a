"""How it is measured: clocks, memory, the machine's name, peers taking turns, and the record of one case.

Imports `benchmarks.work` and `benchmarks.against`.
"""
