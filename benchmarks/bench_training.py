"""A step of quantization-aware training under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kdq.bench.training import SCHEMES, training_step_cases


@pytest.mark.parametrize("name", ["torch float32", *SCHEMES])
def test_training_step(run_family: Callable[..., Any], name: str) -> None:
    run_family(training_step_cases, name)
