"""Benchmarks: ratios within one run. `python -m benchmarks` runs all; each module runs alone too (`--help`)."""
