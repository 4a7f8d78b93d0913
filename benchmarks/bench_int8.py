"""The int8 kernels under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kdq.bench.int8 import int8_linear_cases, int8_matmul_cases


@pytest.mark.parametrize("name", ["kdq int8_matmul", "torch float32", "torch bfloat16", "torch _int_mm"])
def test_int8_matmul(run_family: Callable[..., Any], name: str) -> None:
    run_family(int8_matmul_cases, name)


@pytest.mark.parametrize(
    "name",
    [
        "kdq int8_linear",
        "kdq int8_linear, static",
        "kdq int8_weight_only_linear",
        "torch float32",
        "torch bfloat16",
        "torch quantized fbgemm",
        "torch quantized x86",
        "torch quantized onednn",
        "torch _int_mm + scaling",
        "ONNX Runtime int8",
    ],
)
def test_int8_linear(run_family: Callable[..., Any], name: str) -> None:
    run_family(int8_linear_cases, name)
