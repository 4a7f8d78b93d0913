"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import kdq_kernels

ALL_ISAS = ["reference", "avx2", "avx512", "avx512vnni"]


@pytest.fixture(params=ALL_ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every instruction set; skips, visibly, those that this CPU lacks."""
    name: str = request.param
    if name not in kdq_kernels.available_isas():
        pytest.skip(f"this CPU cannot run {name}")
    before = kdq_kernels.cpu_isa()
    kdq_kernels.set_isa(name)
    yield name
    kdq_kernels.set_isa(before)
