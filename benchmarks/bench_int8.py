"""The int8 kernels under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kdq.bench.int8 import int8_linear_cases, int8_matmul_cases
from kdq.bench.weight_only import weight_only_cases

FLOAT_PEERS = ["torch float32", "torch bfloat16", "ONNX Runtime float32", "OpenVINO float32"]


@pytest.mark.parametrize("name", ["kdq int8_matmul", "torch float32", "torch bfloat16", "torch _int_mm"])
def test_int8_matmul(run_family: Callable[..., Any], name: str) -> None:
    run_family(int8_matmul_cases, name)


@pytest.mark.parametrize(
    "name",
    [
        "kdq int8_linear",
        "kdq int8_linear, static",
        *FLOAT_PEERS,
        "torch quantized fbgemm",
        "torch quantized x86",
        "torch quantized onednn",
        "torch _int_mm + scaling",
        "ONNX Runtime int8",
        "OpenVINO int8",
    ],
)
def test_int8_linear(run_family: Callable[..., Any], name: str) -> None:
    run_family(int8_linear_cases, name)


@pytest.mark.parametrize(
    "name",
    [
        "kdq int8_weight_only_linear",
        *FLOAT_PEERS,
        "torch _weight_int8pack_mm",
        "torchao int8 weight only, compiled",
    ],
)
def test_int8_weight_only_linear(run_family: Callable[..., Any], name: str) -> None:
    run_family(weight_only_cases, name)
