"""The binary kernels under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kdq.bench.binary import binary_linear_cases, binary_matmul_cases, binary_threshold_cases

FLOAT_PEERS = ["torch float32", "torch bfloat16", "ONNX Runtime float32", "OpenVINO float32"]


@pytest.mark.parametrize("name", ["kdq binary_matmul", "kdq int8_matmul", *FLOAT_PEERS, "torch _int_mm"])
def test_binary_matmul(run_family: Callable[..., Any], name: str) -> None:
    run_family(binary_matmul_cases, name)


@pytest.mark.parametrize(
    "name",
    ["kdq binary_linear", "kdq int8_linear", *FLOAT_PEERS, "torch quantized x86", "ONNX Runtime int8", "OpenVINO int8"],
)
def test_binary_linear(run_family: Callable[..., Any], name: str) -> None:
    run_family(binary_linear_cases, name)


@pytest.mark.parametrize("name", ["kdq binary_threshold", "kdq binary_matmul", "torch float32", "torch _int_mm"])
def test_binary_threshold(run_family: Callable[..., Any], name: str) -> None:
    run_family(binary_threshold_cases, name)
