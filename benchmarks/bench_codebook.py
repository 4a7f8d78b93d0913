"""The codebook kernels under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kdq.bench.codebook import codebook_cases


@pytest.mark.parametrize(
    "name",
    [
        "kdq codebook_linear",
        "kdq int8_weight_only_linear",
        "torch float32",
        "torch bfloat16",
        "ONNX Runtime float32",
        "OpenVINO float32",
    ],
)
def test_codebook_linear(run_family: Callable[..., Any], name: str) -> None:
    run_family(codebook_cases, name)
