"""Who is measured: ours, torch's own, other ways to write the same in torch, and the plain copy.

Imports `benchmarks.work`.
"""
