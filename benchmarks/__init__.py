"""Benchmarks: what is measured, against whom, and the report. `docs/performance.md` explains the method."""
