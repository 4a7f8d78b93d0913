"""Budget: what a converted model may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper bounds for a converted model; None is no bound, and at least one is given.

    Args:
        latency_ms: milliseconds of one forward pass on the loader's first batch.
        size_bytes: bytes of all tensors as `kdq.save` writes them. The file's header comes on top: 500 to 700 bytes
            for a linear layer, as much for a batch norm.
        average_bits: bits of a weight, averaged over the weights of the layers that can be quantized. Layers that stay
            in float count with their float bits.
    """

    latency_ms: float | None = None
    size_bytes: float | None = None
    average_bits: float | None = None

    def __post_init__(self) -> None:
        bounds = {"latency_ms": self.latency_ms, "size_bytes": self.size_bytes, "average_bits": self.average_bits}
        if all(bound is None for bound in bounds.values()):
            raise ValueError(f"budget: expected at least one of {', '.join(bounds)}, got none")
        for name, bound in bounds.items():
            if bound is None:
                continue
            if isinstance(bound, bool) or not isinstance(bound, int | float):
                raise TypeError(f"{name}: expected a number, got {bound!r}")
            if not (bound > 0 and math.isfinite(bound)):
                raise ValueError(f"{name}: expected a finite number above 0, got {bound!r}")
