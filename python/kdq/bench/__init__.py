"""Every kernel against the PyTorch op it replaces, its best peer, and the machine's own limit.

A *case* is one shape of one family with all its contenders and what limits it; `families.py` lists who builds them, for
a `target.py`, a CPU or a GPU; `runner.py` checks them and times them interleaved by the `clocks.py`, `table.py` and
`plot.py` show the result; `scaling.py` follows the time along each side of a product. `kdq bench` is the command line;
`benchmarks/` runs the same contenders under pytest-benchmark.
"""

from kdq.bench import plot, table
from kdq.bench.case import Case, Contender
from kdq.bench.runner import Measurement, run_bench

__all__ = ["Case", "Contender", "Measurement", "plot", "run_bench", "table"]
