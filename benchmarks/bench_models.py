"""Whole models under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kdq.bench.models import model_cases


@pytest.mark.parametrize(
    "name",
    [
        "kdq Int8Dynamic",
        "torch float32",
        "torch bfloat16",
        "torch quantize_dynamic",
        "torchao int8, compiled",
        "ONNX Runtime dynamic",
    ],
)
def test_models(run_family: Callable[..., Any], name: str) -> None:
    run_family(model_cases, name)
