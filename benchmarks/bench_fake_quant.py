"""fake-quant, forward and backward, under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kdq.bench.fake_quant import fake_quantize_cases, fake_quantize_out_cases
from kdq.bench.fake_quant_gradients import fake_quantize_backward_cases, fake_quantize_training_cases


@pytest.mark.parametrize(
    "name",
    [
        "kdq fake_quantize",
        "torch per_tensor",
        "torch per_channel",
        "torch learnable per_tensor",
        "torch learnable per_channel",
        "torch.compile",
    ],
)
def test_fake_quantize(run_family: Callable[..., Any], name: str) -> None:
    run_family(fake_quantize_cases, name)


@pytest.mark.parametrize("name", ["kdq fake_quantize, out", "torch.compile, out"])
def test_fake_quantize_out(run_family: Callable[..., Any], name: str) -> None:
    run_family(fake_quantize_out_cases, name)


@pytest.mark.parametrize("name", ["kdq backward", "torch learnable backward"])
def test_fake_quantize_backward(run_family: Callable[..., Any], name: str) -> None:
    run_family(fake_quantize_backward_cases, name)


@pytest.mark.parametrize("name", ["kdq forward and backward", "torch learnable"])
def test_fake_quantize_training(run_family: Callable[..., Any], name: str) -> None:
    run_family(fake_quantize_training_cases, name)
