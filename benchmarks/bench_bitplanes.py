"""Linear layers by bit planes under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kdq.bench.bitplanes import bitplane_linear_cases


@pytest.mark.parametrize("name", ["kdq bitplane_linear", "kdq int8_linear, 2 bits", "torch _weight_int4pack_mm"])
def test_bitplane_linear(run_family: Callable[..., Any], name: str) -> None:
    run_family(bitplane_linear_cases, name)
