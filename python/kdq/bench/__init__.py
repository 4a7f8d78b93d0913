"""Every kernel against the PyTorch op it replaces, its best peer, and the machine's own limit.

A *case* is one shape of one family with all its contenders; `cases.py` files build them, `runner.py` checks and times
them interleaved, `table.py` shows the result. `kdq bench` is the command line; `benchmarks/` runs the same contenders
under pytest-benchmark.
"""

from kdq.bench import table
from kdq.bench.case import Case, Contender
from kdq.bench.runner import Measurement, run_bench

__all__ = ["Case", "Contender", "Measurement", "run_bench", "table"]
