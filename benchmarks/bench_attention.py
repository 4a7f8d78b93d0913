"""Attention under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kdq.bench.attention import attention_cases


@pytest.mark.parametrize("name", ["kdq scaled_dot_product_attention", "torch float32"])
def test_attention(run_family: Callable[..., Any], name: str) -> None:
    run_family(attention_cases, name)
