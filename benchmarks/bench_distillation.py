"""The distillation loss under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kdq.bench.distillation import distillation_loss_cases


@pytest.mark.parametrize("name", ["kdq distillation_loss", "torch eager", "torch.compile"])
def test_distillation_loss(run_family: Callable[..., Any], name: str) -> None:
    run_family(distillation_loss_cases, name)
