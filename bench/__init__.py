"""Benchmarks: ours beside what a user would otherwise run, in one process, with ratios and shares of the ceilings.

`python -m bench` (pytest-benchmark over RoPE and attention), `python -m bench.cpu` (the CPU backend against its
ceilings), `python -m bench.angles` (error of the angles), `python -m bench.readme` (the README's tables from the JSON).
Results are JSON under bench/results/. A result is refused where ours and a peer's disagree beyond their dtype.
"""
